"""Functions that tests share; fixtures are in conftest.py."""
