from jaxppo import errors
from jaxppo.errors import Diverged, Interrupted, PretrainedError, RunError, UserError


def test_each_error_has_its_exit_code():
    """README and tests/README.md promise these to scripts that restart runs."""
    codes = {x: x.code for x in (RunError, UserError, PretrainedError, Interrupted, Diverged)}
    assert codes == {RunError: 1, UserError: 2, PretrainedError: 2, Interrupted: 75, Diverged: 76}


def test_the_first_line_of_an_error():
    assert errors.first_line(ValueError("one\ntwo")) == "one"
