import toys, jax


def test_a(family):
    r = toys.roll(family, toys.prompts())
    print(r.tokens)


def test_b(toy_step):
    s, m = toy_step(toy_step.state(), toys.prompts())
    print(m)
