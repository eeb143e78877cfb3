"""Write the documentation's tables of results, and the findings in the ablations' docstrings, from
the records in experiments/results/.

Command    python experiments/tables.py
           It rewrites the pages in docs/ between <!-- NAME --> and <!-- /NAME -->. A test fails if
           a page differs from the records.
"""

import json
import re
import statistics
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from jaxppo import cli
from jaxppo.ablation.statistics import mean_interval

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"


@dataclass(frozen=True)
class Tables:
    docs: Path = ROOT / "docs"
    """the folder whose pages are rewritten"""
    traceback: bool = False


def records(folder: Path) -> list[dict]:
    """The records of a folder, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


OWN_TABLE = ("multitask", "safety")  # folders that `tasks` leaves to other tables


def task_records() -> list[dict]:
    """The records of single tasks with a policy stage."""
    folders = sorted(x for x in RESULTS.iterdir() if x.is_dir() and x.name not in OWN_TABLE)
    found = [record for folder in folders for record in records(folder)]
    return [x for x in found if "policy" in x and "environment" not in x]


def mean_and_error(values: list[float], digits: int, *, sign: bool = False) -> str:
    """Mean ± standard error over seeds; the mean alone for one seed."""
    mean = sum(values) / len(values)
    text = f"{mean:+.{digits}f}" if sign else f"{mean:.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"
    return short(text)


def short(text: str) -> str:
    """.5 for 0.5, as the documentation writes numbers."""
    return re.sub(r"\b0\.", ".", text)


def rounded(value: float, digits: int) -> str:
    """A rounded number; 0 has no sign.

    >>> rounded(-0.0001, 2)
    '.00'
    """
    return short(f"{round(value, digits) + 0.0:.{digits}f}")


def sentiment() -> str:
    """The main job: a row for each run, and the mean over seeds for each reward and start."""
    names = [
        "reward",
        "seed",
        "judge before",
        "judge after",
        "gain (± s.e. over 512 pairs)",
        "KL, nats",
    ]
    rows = header([*names, "distinct-2 / reference's", "classifier accuracy"])
    groups: dict[str, list[dict]] = defaultdict(list)
    for record in records(RESULTS / "sentiment"):
        if record["config"]["steps"] == 50:
            groups[sentiment_kind(record["config"])].append(record)
    for name, own in sorted(groups.items(), key=lambda group: group[0].lower()):
        for x in own:
            r, accuracy = x["result"], x["result"]["reward_model_accuracy"]
            cells = [
                name,
                x["config"]["seed"],
                f"{r['sentiment_before']:.3f}",
                f"{r['sentiment_after']:.3f}",
                f"{r['gain']:+.3f} ± {r['gain_se']:.3f}",
                f"{r['kl']:.2f} ± {r['kl_se']:.2f}",
                f"{r['distinct_2_ratio']:.3f}",
                "" if accuracy is None else f"{accuracy:.3f}",
            ]
            rows.append(line(cells))
        if len(own) == 1:
            continue
        numbers = [("gain", 3, True), ("kl", 2, False), ("distinct_2_ratio", 3, False)]
        means = [
            f"**{mean_and_error([x['result'][key] for x in own], digits, sign=sign)}**"
            for key, digits, sign in numbers
        ]
        rows.append(line([f"**{name}**", "**mean ± s.e. over seeds**", "", "", *means, ""]))
    return "\n".join(rows)


def sentiment_kind(config: dict) -> str:
    """Describe how a run of the main job differs from the plainest one."""
    given = lambda name, value: config.get(name) == value
    differences = {
        "after warm-up": config["model"] != "smollm2",
        "adapters on all layers": given("lora_on", "all"),
        "base in 8 bits": given("base_dtype", "int8"),
        "sampled in 8 bits": given("decode_dtype", "int8"),
        "truncated weights": given("correction", "truncated"),
    }
    reward = {"vader": "VADER"}.get(config["reward"], config["reward"])
    return ", ".join([reward, *(name for name, here in differences.items() if here)])


def header(names: list[str]) -> list[str]:
    """The first two lines of a table."""
    return [line(names), line(["---"] * len(names))]


def line(cells: list) -> str:
    """A row of a table."""
    return re.sub(r" +", " ", "| " + " | ".join(short(str(cell)) for cell in cells) + " |")


TASK_COLUMNS = ["task", "model, method, runs", "metric", "untrained", "supervised", "policy"]
TASK_COLUMNS += ["gain [95 % interval]", "policy alone, its gain"]


def tasks() -> str:
    """A row for each metric of each task and method, on the test examples: the mean over seeds
    before and after the policy stage, and its gain with the interval over seeds. The policy
    "alone" starts from the untrained model.
    """
    rows = header(TASK_COLUMNS)
    groups: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for record in task_records():
        groups[record["task"], f"{variant(record)}; {method(record)}"].append(record)
    for (task, what), found in groups.items():
        own = [x for x in found if "supervised" in x]
        alone = [x for x in found if "start" in x]
        some = own or alone
        minutes = [sum(x["minutes"].values()) for x in some]
        commits = sorted({x["versions"]["git"][:7] for x in some if "git" in x["versions"]})
        head = [task, f"{what}; {seeds_and_minutes(minutes)} ({', '.join(commits)})"]
        metrics = list(some[0]["gain"])
        stages = ("policy", "supervised" if own else "start")
        judged = [name for name in some[0]["policy"] if name not in ("score", *metrics)]
        metrics += [name for name in judged if all(name in x[stages[1]] for x in some)]
        for number, metric in enumerate(metrics):
            known = [x[stage][metric] for x in some for stage in stages]
            digits = 3 if max(map(abs, known)) < 2 else 1
            mean = lambda of, stage, digits=digits, metric=metric: (
                rounded(statistics.mean(x[stage][metric] for x in of), digits) if of else ""
            )
            gain = lambda of, start, digits=digits, metric=metric: gain_over_seeds(
                [x["policy"][metric] - x[start][metric] for x in of], digits
            )
            cells = [mean(alone, "start"), mean(own, "supervised"), mean(own, "policy")]
            cells.append(gain(own, "supervised"))
            cells.append(", ".join(filter(None, [mean(alone, "policy"), gain(alone, "start")])))
            rows.append(line([*(head if number == 0 else ("", "")), spaced(metric), *cells]))
    return "\n".join([*rows, *single_stage()])


def spaced(metric: str) -> str:
    """The name of a metric in words, which may stand on several lines."""
    return metric.replace("_", " ")


def seeds_and_minutes(minutes: list[float]) -> str:
    """How many seeds there are, and their mean duration."""
    number = "1 seed" if len(minutes) == 1 else f"{len(minutes)} seeds"
    return f"{number}, {statistics.mean(minutes):.0f} min"


def gain_over_seeds(gains: list[float], digits: int) -> str:
    """The mean gain with its 95 % interval; without the interval for one seed."""
    if not gains:
        return ""
    if len(gains) == 1:
        return short(f"{gains[0]:+.{digits}f}")
    value, low, high = mean_interval(gains)
    return short(f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]")


def method(record: dict) -> str:
    """Name the advantage estimator and the number of samples a prompt."""
    config = record["config"]
    size = f" × {config['group_size']}" if config["group_size"] > 1 else ""
    return config["advantage"] + size


def methods() -> str:
    """A row for each metric that PPO with a critic and a group method changed from one start, with
    equal samples: the paired difference over seeds with the 95 % interval.
    """
    names = ["task", "seeds", "metric", "start", "with a critic", "in groups"]
    rows = header([*names, "critic − groups [95 % interval]"])
    pairs: dict[tuple[str, str], dict] = defaultdict(lambda: defaultdict(dict))
    for record in task_records():
        if "supervised" in record:
            own = pairs[record["task"], variant(record)][record["config"]["seed"]]
            own[record["config"]["group_size"] > 1] = record
    for (task, what), seeds in pairs.items():
        both = [
            (own[False], own[True])
            for own in seeds.values()
            if len(own) == 2 and own[False]["supervised"] == own[True]["supervised"]
        ]
        if not both:
            continue
        for number, metric in enumerate(name for name in both[0][0]["policy"] if name != "score"):
            mean = lambda side, stage, both=both, metric=metric: rounded(
                statistics.mean(pair[side][stage][metric] for pair in both), 3
            )
            cells = [mean(0, "supervised"), mean(0, "policy"), mean(1, "policy")]
            cells.append(
                gain_over_seeds([x["policy"][metric] - y["policy"][metric] for x, y in both], 3)
            )
            head = [f"{task}, {what}", len(both)] if number == 0 else ["", ""]
            rows.append(line([*head, spaced(metric), *cells]))
    return "\n".join(rows)


def together() -> str:
    """A row for each task of a network that learned several, and each of its metrics, beside a
    network that learned the task alone: means over seeds with both, and the paired difference at
    the end with the 95 % interval.
    """
    names = ["task", "seeds", "metric", "supervised: alone", "together", "policy: alone"]
    rows = header([*names, "together", "together − alone [95 % interval]"])
    seeds: dict[int, dict[str, dict]] = defaultdict(dict)
    for record in records(RESULTS / "multitask"):
        of = record["config"]["tasks"]
        seeds[record["config"]["seed"]][of[0] if len(of) == 1 else "together"] = record
    for task in sorted({name for own in seeds.values() for name in own} - {"together"}):
        both = [(x[task], x["together"]) for x in seeds.values() if {task, "together"} <= x.keys()]
        for number, kind in enumerate(("exact", "sampled_exact") if both else ()):
            key = f"{kind} {task}"
            cells = [
                f"{statistics.mean(pair[side][stage][key] for pair in both):.3f}"
                for stage in ("supervised", "policy")
                for side in (0, 1)
            ]
            cells.append(gain_over_seeds([y["policy"][key] - x["policy"][key] for x, y in both], 3))
            head = [task, len(both)] if number == 0 else ["", ""]
            rows.append(line([*head, spaced(kind), *cells]))
    return "\n".join(rows)


SAFETY = ("negative", "profane", "gap", "kl")


def safety() -> str:
    """A row for each pair of weights in the order of their sum: means over seeds after training,
    and the differences to the model before it.
    """
    groups: dict[tuple[float, float], list[dict]] = defaultdict(list)
    for record in records(RESULTS / "safety"):
        groups[record["config"]["profanity"], record["config"]["bias"]].append(record)
    names = ["`--profanity`", "`--bias`", "seeds", "negative sentiment", "profane"]
    rows = header([*names, "gap between women and men", "KL"])
    for weights, found in sorted(groups.items(), key=lambda group: sum(group[0])):
        cells = [f"{x:g}" for x in weights] + [len(found)]
        for name in SAFETY:
            mean = statistics.mean(x["policy"][name] for x in found)
            gain = gain_over_seeds([x["policy"][name] - x["start"][name] for x in found], 3)
            cells.append(f"{mean:.3f}, {gain}" if name != "kl" else f"{mean:.1f}")
        rows.append(line(cells))
    return "\n".join(rows)


def episodes() -> str:
    """A row for each game: the mean score of episodes on held-out instances before and after the
    policy gradient, and its gain over seeds with the 95 % interval.
    """
    names = ["game", "seeds", "sampled: start", "trained", "greedy: start", "trained"]
    rows = header([*names, "gain, sampled [95 % interval]", "script", "minutes"])
    groups: dict[str, list[dict]] = defaultdict(list)
    for record in records(RESULTS / "episodes"):
        name = " ".join([f"`{record['environment']}`", *record["game"]])
        if record["config"]["model"]:
            name += f", {variant(record)}"
        groups[name].append(record)
    for game, found in groups.items():
        mean = lambda of, found=found: f"{statistics.mean(map(of, found)):.3f}"
        stages = [("supervised", "sampled"), ("policy", "sampled")]
        stages += [("supervised", "score"), ("policy", "score")]
        scores = [mean(lambda x, a=a, b=b: x[a][b]) for a, b in stages]
        gains = [x["policy"]["sampled"] - x["supervised"]["sampled"] for x in found]
        minutes = f"{statistics.mean(sum(x['minutes'].values()) for x in found):.0f}"
        script, gain = mean(lambda x: x["script"]), gain_over_seeds(gains, 3)
        rows.append(line([game, len(found), *scores, gain, script, minutes]))
    return "\n".join(rows)


WAYS = {
    "teacher": "(the teacher)",
    "student": "(the student before)",
    "supervised": "imitates the teacher's samples",
    "reward": "own samples, `--distil reward`",
    "reverse": "own samples, `--distil reverse`",
    "forward": "own samples, `--distil forward`",
    "jsd": "own samples, `--distil jsd`",
}


def distillation() -> str:
    """A row for each way to learn from a teacher: the mean share of right responses over seeds, and
    the differences to supervised learning with intervals over seeds.
    """
    found = records(RESULTS / "distil")
    names = ["the student", "seeds", "samples right", "greedy right"]
    rows = header([*names, "samples, beside imitation", "greedy, beside imitation"])
    for way, text in WAYS.items():
        known = [x["before"] | x["arms"] for x in found]
        pairs = [(x[way], x["supervised"]) for x in known if way in x]
        if not pairs:
            continue
        cells, metrics = [text, len(pairs)], ("sampled_exact", "exact")
        cells += [f"{statistics.mean(own[name] for own, _ in pairs):.3f}" for name in metrics]
        for name in metrics:
            gains = [own[name] - imitation[name] for own, imitation in pairs]
            cells.append("" if way == "supervised" else gain_over_seeds(gains, 3))
        rows.append(line(cells))
    return "\n".join(rows)


# Scripts with one stage, and the metrics that the table shows.
SINGLE_STAGE = {
    "pretrain": {"perplexity": "held-out perplexity", "token_accuracy": "token accuracy"},
    "sft": {"perplexity": "held-out perplexity", "token_accuracy": "token accuracy"},
    "reward_model": {"test_accuracy": "accuracy on pairs"},
    "classify": {"test_accuracy": "accuracy"},
}


def single_stage() -> list[str]:
    """Rows of the same table for scripts with one stage."""
    rows = []
    for name, shown in SINGLE_STAGE.items():
        groups: dict[str, list[dict]] = defaultdict(list)
        for record in records(RESULTS / name):
            groups[variant(record)].append(record)
        for what, found in groups.items():
            head = [name, f"{what}; {seeds_and_minutes([x['minutes'] for x in found])}"]
            for number, (key, metric) in enumerate(shown.items()):
                values = [x["result"][key] for x in found]
                value = mean_and_error(values, 3 if max(values) < 2 else 1)
                cells = [metric, "", value, "", "", ""]
                rows.append(line([*(head if number == 0 else ("", "")), *cells]))
    return rows


def variant(record: dict) -> str:
    """Describe what was trained in a few words."""
    config = record["config"]
    if isinstance(config.get("layers"), list):  # names of layers: classify.py
        return f"{', '.join(config['layers'])}, new"
    if config["model"]:
        return f"{config['model']}, LoRA {config['lora']}" if config["lora"] else config["model"]
    return f"{config['model_kind']} {config['width']} × {config['layers']}, new"


MEASURES = {
    "end": "reward at the end",
    "area": "reward of all steps",
    "kl": "nats to the reference",
    "-kl": "fewer nats to the reference",
    "mean_entropy": "entropy of all steps",
    "entropy": "entropy at the end",
    "score": "reward of the trained policy",
    "best_of_8": "best of eight responses",
    "excess_length": "tokens of wrong answers above right ones'",
}


def in_words(metric: str) -> str:
    """Describe a metric; a leading minus means that less is better.

    >>> in_words("-kl"), in_words("-length")
    ('fewer nats to the reference', 'less length')
    """
    name = metric.lstrip("-")
    return MEASURES.get(metric) or "less " * metric.startswith("-") + MEASURES.get(name, name)


SCALES = {"ladder": "ladder", "small": "small", "smollm2": "SmolLM2"}


def ablations() -> str:
    """A row for each claim of each question: the paired difference that it says is above 0 and the
    verdict, at each scale.
    """
    rows = header(
        [
            "question",
            "claim",
            "measure",
            *(f"{name}: difference [95 % interval]" for name in SCALES.values()),
        ]
    )
    questions: dict[str, dict[str, dict]] = defaultdict(dict)
    for record in records(RESULTS / "ablations"):
        questions[record["question"]][record["scale"]] = record
    for question, found in sorted(questions.items()):
        claims = {claim["says"]: claim for record in found.values() for claim in record["claims"]}
        for number, (says, claim) in enumerate(claims.items()):
            name = f"[{question}](../experiments/ablations/{question}.py)" if number == 0 else ""
            whose = f"[paper]({claim['paper']})" if claim["paper"] else "ours"
            cells = [
                outcome(found[scale]["claims"], says) if scale in found else "" for scale in SCALES
            ]
            rows.append(line([name, f"{says} ({whose})", in_words(claim["metric"]), *cells]))
    return "\n".join(rows)


def outcome(claims: list[dict], says: str) -> str:
    """The verdict on a claim and its difference; empty if it was not tested."""
    for claim in claims:
        if claim["says"] == says:
            value, low, high = claim["difference"]
            return f"**{claim['verdict']}** {value:+.3f} [{low:+.3f}, {high:+.3f}]"
    return ""


def write_findings(text: str, found: list[dict]) -> str:
    """Replace the end of a script's docstring by what its records say: the minutes, and each claim
    with its verdict.
    """
    sentences = []
    for record in found:
        minutes, scale = record["about"]["minutes"], record["scale"]
        sentences.append(
            f"{minutes:.0f} minutes at --scale {scale} on a core that other work shared."
        )
        for claim in record["claims"]:
            value, low, high = claim["difference"]
            sentences.append(
                f"{claim['says']}: {claim['verdict']} ({in_words(claim['metric'])} {value:+.3f}, "
                f"95 % interval {low:+.3f} to {high:+.3f})."
            )
    lines = [
        line for x in sentences for line in textwrap.wrap(short(x), 89, break_on_hyphens=False)
    ]
    block = textwrap.indent("\n".join(lines), " " * 11).replace(" " * 11, "Found      ", 1)
    head, rest = re.match(r'(""".*?)(?:Found .*?)?(""".*)', text, re.S).groups()
    return head + (block + "\n" if block else "") + rest


def update_scripts() -> None:
    """Write the records' findings into the docstring of every ablation."""
    for path in sorted((ROOT / "experiments" / "ablations").glob("*.py")):
        if found := [x for x in records(RESULTS / "ablations") if x["question"] == path.stem]:
            path.write_text(write_findings(path.read_text(), found))


TABLES = {  # by name: what makes it, and its page
    "sentiment": (sentiment, "results.md"),
    "tasks": (tasks, "tasks.md"),
    "methods": (methods, "tasks.md"),
    "together": (together, "tasks.md"),
    "safety": (safety, "tasks.md"),
    "ablations": (ablations, "ablations.md"),
    "episodes": (episodes, "environments.md"),
    "distillation": (distillation, "algorithms.md"),
}


def render(text: str) -> str:
    """Replace the tables of a page."""
    for name, (make, _) in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.S)
        text = pattern.sub(lambda match, make=make: match[1] + make() + match[2], text)
    return text


def main(options: Tables) -> None:
    for page in dict.fromkeys(page for _, page in TABLES.values()):
        path = options.docs / page
        text = path.read_text()
        new = render(text)
        if new != text:
            path.write_text(new)
        print(f"{path}: {'written' if new != text else 'already up to date'}")
    update_scripts()


if __name__ == "__main__":
    cli.script(main, Tables)
