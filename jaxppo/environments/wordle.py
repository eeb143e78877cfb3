"""Guess a word of five letters; each guess is answered letter by letter.

A turn is five small letters on a line, which need not be a word of the list. The answer
has a letter for each of them: "g" right, "y" in the word but elsewhere, "-" not in it.
Letters that occur several times are counted as in the game: green ones first, then from
left to right as many yellow ones as the word has left. The right word ends the episode
with the reward 1, everything else has the reward 0. Other turns are answered with "?",
and cost a guess.

The reference is a strategy: the word that divides the words still possible into the
most classes (of words with the same answer), possible words first. `optimum` is the
share of words that it finds; the best policy may find a few more.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8

from jaxppo.environments import strings
from jaxppo.environments.text import Answer, Game, TextEnvironment, from_rows

# common words, by hand
COMMON = """
    about above actor after again agree ahead alarm album alive alone angle angry apple
    arena arrow aside award basic beach begin bench birth black blade blame blank blind
    block blood board bonus brain brand brave bread break brick bride brief bring broad
    brown brush build cabin cable carry catch cause chain chair charm chart chase cheap
    check cheek chess chest chief child china claim class clean clear clerk climb clock
    close cloth cloud coach coast color couch count court cover crack craft crash cream
    crime cross crowd crown curve cycle dance death delay depth dirty doubt dozen draft
    drama dream dress drink drive early earth eight elbow empty enemy enjoy enter entry
    equal error event exact extra faith false fault favor fence field fifth fight final
    first flame flash fleet floor flour focus force frame fresh front fruit ghost giant
    glass globe grace grade grain grand grant grass great green group guard guess guest
    guide habit happy heart heavy hello honey horse hotel house human ideal image index
    inner input issue joint judge juice knife knock label labor large laugh layer learn
    lemon level light limit local lucky lunch magic major match maybe metal minor model
    money month motor mouse mouth movie music nerve never night noise north novel nurse
    ocean offer onion order other owner paint panel paper party peace phone photo piano
    piece pilot pitch place plain plane plant plate point pound power press price pride
    prize proof proud queen quick quiet radio raise range rapid reach ready river robot
    rough round route royal salad scale scene score sense serve seven shade shake shape
    share sharp sheep sheet shelf shell shift shine shirt shock shoot short skill sleep
    slice small smart smile smoke solid sound south space spare speak speed spice spoon
    sport staff stage stair stamp stand start state steam steel stick stone store storm
    story strip study style sugar sunny super sweet table taste teach thank thick thing
    think three throw tiger tired title today tooth topic total touch tower track trade
    train treat trial tribe truck trust truth uncle under union until upper urban usual
    value video visit voice waste watch water wheel white whole woman world worry wrong
    young youth
"""
WORDS = tuple(COMMON.split())
POWERS = 3 ** np.arange(5)  # an answer as a number


def choose_words(number: int) -> tuple[str, ...]:
    """So many words, spread over the list."""
    return tuple(WORDS[i] for i in np.linspace(0, len(WORDS) - 1, number).astype(int))


def mark(guess: UInt8[Array, "5"], word: UInt8[Array, "5"]) -> Int[Array, "5"]:
    """The answer: 2 right, 1 elsewhere, 0 not in the word."""
    right = guess == word
    same = guess[:, None] == guess[None]
    place = jnp.arange(5)
    before = (same & ~right[None] & (place[None] < place[:, None])).sum(1)
    left = ((guess[:, None] == word[None]) & ~right[None]).sum(1)
    return jnp.where(right, 2, jnp.where(before < left, 1, 0))


def make_environment(guesses: int) -> TextEnvironment:
    """The game on instances {"word": UInt8[B 5]}."""

    def step(word: Array, text: strings.String, key: Array, turn: Array):
        line = strings.first_line(text)
        guess = line.bytes[:5]
        readable = (line.length == 5) & ((guess >= ord("a")) & (guess <= ord("z"))).all()
        marks = jnp.frombuffer(b"-yg", np.uint8)[mark(guess, word)]
        letters = jnp.concatenate([marks, jnp.array([ord("\n")], jnp.uint8)])
        unknown = strings.string("?\n", 6)
        reply = strings.String(
            jnp.where(readable, letters, unknown.bytes), jnp.where(readable, 6, 2)
        )
        found = readable & (guess == word).all()
        return word, Answer(reply, found.astype(jnp.float32), found)

    return from_rows(
        lambda instance: instance["word"],
        step,
        max_turns=guesses,
        turn_length=6,
        reply_length=6,
        alphabet=b"gy-?\n",
    )


@functools.cache
def table(words: tuple[str, ...]) -> np.ndarray:
    """The answers [guess word] as numbers in base 3, the first letter last."""
    letters = np.array([list(word.encode()) for word in words], np.uint8)
    marks = jax.jit(jax.vmap(jax.vmap(mark, (None, 0)), (0, None)))(letters, letters)
    return np.asarray(marks) @ POWERS


@functools.cache
def next_guess(words: tuple[str, ...], possible: tuple[int, ...]) -> int:
    """The number of the word that the reference guesses when these are possible."""
    if len(possible) == 1:
        return possible[0]
    answers = np.sort(table(words)[:, possible], axis=1)
    classes = 1 + (np.diff(answers, axis=1) != 0).sum(1)
    rank = 2 * classes
    rank[list(possible)] += 1
    return int(rank.argmax())


@functools.cache
def solved(words: tuple[str, ...], possible: tuple[int, ...], guesses: int) -> int:
    """How many of the possible words the reference finds."""
    if guesses == 0:
        return 0
    guess = next_guess(words, possible)
    answers = table(words)[guess]
    classes: dict[int, list[int]] = {}
    for word in possible:
        if word != guess:
            classes.setdefault(int(answers[word]), []).append(word)
    rest = sum(solved(words, tuple(x), guesses - 1) for x in classes.values())
    return rest + (guess in possible)


def make(words: int = len(WORDS), guesses: int = 6) -> Game:
    """The game with this many words."""
    chosen, every = choose_words(words), tuple(range(words))

    def instances(number: int, seed: int) -> list[dict[str, Any]]:
        drawn = np.random.default_rng(seed).choice(chosen, number)
        of = lambda word: np.frombuffer(str(word).encode(), np.uint8).copy()
        return [{"prompt": "word:\n", "word": of(word)} for word in drawn]

    def script(instance: Mapping[str, Any], replies: Sequence[str], rng: np.random.Generator):
        possible = every
        for reply in replies:
            guess = next_guess(chosen, possible)
            answer = np.dot(["-yg".find(x) for x in reply[:5]], POWERS[: len(reply[:5])])
            possible = tuple(i for i in possible if table(chosen)[guess, i] == answer) or every
        return chosen[next_guess(chosen, possible)] + "\n"

    def random(instance: Mapping[str, Any], replies: Sequence[str], rng: np.random.Generator):
        return str(rng.choice(chosen)) + "\n"

    best = solved(chosen, every, guesses) / words
    return Game(make_environment(guesses), instances, script, random, best)
