"""hypothesis where it is installed; elsewhere stand-ins that skip the tests which need it."""

import pytest

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:

    class Anything:
        """Takes the place of strategies and settings: every use of it gives another one."""

        def __getattr__(self, name):
            return self

        def __call__(self, *args, **kwargs):
            return self

    st = settings = Anything()

    def given(*args, **kwargs):
        def skipped(test):
            def stand_in():
                pytest.skip("needs hypothesis")

            stand_in.__name__ = test.__name__
            return stand_in

        return skipped


__all__ = ["given", "settings", "st"]
