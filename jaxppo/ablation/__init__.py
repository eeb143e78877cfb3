"""Ablations: one question, its arms on the same seeds, and a verdict on each claim.

An `Arm` is a set of settings, or a change of the step's parts or of the model. Arms
share one program with all their seeds if they can (`sweep`). A `Claim` says beforehand
which arm is better, by which metric; it "agrees" or "disagrees" only if
`statistics.paired_difference` decides, else it is "not decided". The record is JSON,
and the same for the same seeds.
"""
