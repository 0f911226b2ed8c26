import pytest
import torch
from hypothesis import settings

from tests.toy_gans import toy_cleanser, toy_data

torch.set_num_threads(1)
settings.register_profile("ganclean", max_examples=15, deadline=None, derandomize=True, database=None)
settings.load_profile("ganclean")


@pytest.fixture(scope="session")
def X():
    X = toy_data()
    X.flags.writeable = False
    return X


@pytest.fixture(scope="session")
def cleanser(X):
    """A fitted cleanser, to be read and not changed: 16 instances, 9 steps, FID, a quarter removed."""
    return toy_cleanser().fit(X)
