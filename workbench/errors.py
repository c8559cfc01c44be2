"""The one error for what a caller got wrong."""


class UserError(ValueError):
    """A sentence that names the value at fault and the next step; the CLI prints it and exits with code 2."""


class MethodDidNotFire(UserError):
    """A method had something to do in a run and did not do it, so the run's numbers would be those of dense."""
