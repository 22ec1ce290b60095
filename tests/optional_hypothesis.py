"""hypothesis where it is installed; elsewhere stand-ins that skip the tests which need it."""

import pytest

try:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st
except ImportError:

    class Anything:
        """Takes the place of strategies: every use of it gives it again."""

        def __getattr__(self, name):
            return self

        def __call__(self, *args, **kwargs):
            return self

        def __or__(self, other):
            return self

    class Settings(Anything):
        def __call__(self, *args, **kwargs):
            return args[0] if args else self  # as a decorator, the test

    given = lambda *_, **__: pytest.mark.skip("needs hypothesis")  # noqa: E731
    HealthCheck, Phase, settings, st = [], Anything(), Settings(), Anything()


__all__ = ["HealthCheck", "Phase", "given", "settings", "st"]
