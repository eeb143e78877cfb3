import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from jaxppo.errors import UserError
from jaxppo.models import text_classifier
from jaxppo.models.text_classifier import Classifier
from jaxppo.rewards import classifier
from jaxppo.rewards.classifier import LabelledTexts

NET = Classifier(features=8, widths=(1, 2), dropout=0.2)
EMBEDDING = jnp.asarray(np.random.default_rng(0).standard_normal((toys.VOCAB, 6)), jnp.float32)


def texts(n, seed=0) -> LabelledTexts:
    """Texts of 2 to 8 tokens, positive where 5 follows 4: a bag of words does not see it."""
    rng = np.random.default_rng(seed)
    rows, ratings = [], []
    for i in range(n):
        row = rng.integers(2, 8, rng.integers(2, 9)).tolist()
        if i % 2:
            row[:2] = [4, 5]
        else:
            row = [3 if a == 4 and b == 5 else a for a, b in zip(row, [*row[1:], 0], strict=True)]
        rows.append(row)
        ratings.append(1.5 if i % 2 else -1.5)
    return LabelledTexts.encode(
        [str(i) for i in range(n)], np.array(ratings), lambda text: rows[int(text)], length=8
    )


def fit(seed):
    return classifier.fit(NET, EMBEDDING, texts(512), seed=seed, epochs=12, batch_size=32, lr=1e-2)


@pytest.fixture(scope="module")
def fitted():
    return {"embedding": EMBEDDING, "net": fit(0)}


def test_encode_cuts_and_pads_on_the_right():
    data = LabelledTexts.encode(
        ["long", "short"],
        np.array([1.0, -1.0]),
        {"long": [1, 2, 3, 4], "short": [5]}.__getitem__,
        length=3,
    )
    assert data.tokens.tolist() == [[1, 2, 3], [5, 0, 0]]
    assert data.mask.tolist() == [[True, True, True], [True, False, False]]
    assert data.rows(np.array([1])).ratings.tolist() == [-1.0]


@pytest.mark.ci
@pytest.mark.learning
def test_fit_learns_the_order_of_two_tokens(fitted):
    held_out = texts(256, seed=1)
    assert classifier.accuracy(NET, fitted, held_out) > 0.95
    wrong = held_out._replace(ratings=-held_out.ratings)
    assert classifier.accuracy(NET, fitted, wrong) < 0.05


@pytest.mark.ci
def test_fit_is_reproducible(fitted):
    toys.assert_same(fit(0), fitted["net"])
    leaves = zip(jax.tree.leaves(fit(1)), jax.tree.leaves(fitted["net"]), strict=True)
    assert any((a != b).any() for a, b in leaves)


@pytest.mark.ci
def test_padding_changes_nothing(fitted):
    data = texts(6)
    logits = text_classifier.logits(NET, fitted, jnp.asarray(data.tokens), jnp.asarray(data.mask))
    wider = jnp.pad(jnp.where(data.mask, data.tokens, 9), ((0, 0), (0, 3)), constant_values=7)
    got = text_classifier.logits(NET, fitted, wider, jnp.pad(data.mask, ((0, 0), (0, 3))))
    np.testing.assert_allclose(got, logits, atol=1e-4)


@pytest.mark.ci
def test_reward_reads_the_response_alone(fitted, llama):
    rolled = toys.roll(llama, toys.prompts())
    scores, valid = jax.jit(classifier.reward(NET, scale=2.0))(fitted, rolled)
    want = 2 * np.tanh(
        np.asarray(text_classifier.logits(NET, fitted, rolled.response, rolled.mask > 0)) / 2
    )
    np.testing.assert_allclose(scores, want, atol=1e-5)
    assert valid.all() and (np.abs(scores) <= 2).all()
    other = rolled.replace(tokens=rolled.tokens.at[:, :4].set(2))
    np.testing.assert_array_equal(
        classifier.reward(NET)(fitted, other)[0], classifier.reward(NET)(fitted, rolled)[0]
    )


@pytest.mark.ci
def test_an_empty_response_has_a_finite_score(fitted):
    tokens = jnp.zeros((2, 4), jnp.int32)
    out = text_classifier.logits(NET, fitted, tokens, jnp.zeros((2, 4), bool))
    assert np.isfinite(out).all()


def test_accuracy_leaves_out_weak_ratings(fitted):
    data = texts(40, seed=2)
    # Half of the texts are rated .2 against the net: they count only with beyond=0.
    ratings = np.where(np.arange(40) < 20, -0.2 * np.sign(data.ratings), data.ratings)
    data = data._replace(ratings=ratings)
    assert classifier.accuracy(NET, fitted, data, beyond=0.5) > 0.9
    assert classifier.accuracy(NET, fitted, data) < 0.6


def test_windows_are_fragments_of_the_texts():
    data = LabelledTexts.encode(
        ["long", "short"],
        np.array([1.0, -1.0]),
        {"long": [1, 2, 3, 4, 5, 6], "short": [7, 8]}.__getitem__,
        length=6,
    )
    for seed in range(10):
        both = data.with_windows(least=2, most=3, seed=seed)
        toys.assert_same(both.rows(np.arange(2)), data)
        tokens, mask, ratings = both.rows(np.arange(2, 4))
        assert ratings.tolist() == [1.0, -1.0]
        long, short = (row[on].tolist() for row, on in zip(tokens, mask, strict=True))
        assert long in ([1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6], [5, 6])
        assert short == [7, 8]
        assert not tokens[~mask].any()


@pytest.mark.ci
def test_as_a_model_it_has_parameters_and_generates_no_text():
    model = classifier.as_model(NET, vocab_size=10, width=6)
    params = model.init(jax.random.key(0))
    assert model.head(params).shape == (10, 6) and jax.tree.leaves(model.init_cache(2, 8)) == []
    assert text_classifier.logits(
        NET, params, jnp.ones((2, 5), int), jnp.ones((2, 5), bool)
    ).shape == (2,)
    with pytest.raises(UserError, match="a text classifier cannot generate text"):
        model.apply(params, jnp.ones((2, 5), int), jnp.ones((2, 5), bool))


def test_several_classes_cannot_be_a_reward():
    with pytest.raises(UserError, match="a classifier of 3 classes cannot be a reward"):
        classifier.reward(Classifier(classes=3))
