"""Shared by the study's tests: the product's fixtures, and a classifier of features that is trained on few stories."""
import pytest

from study import features
from tests.conftest import (  # noqa: F401
    ROOT,
    STORIES,
    model_dir,
    pairs,
    pairs_file,
    random_model,
    real_data,
    refused,
    tiny_config,
    tok,
)


@pytest.fixture(autouse=True, scope="session")
def small_classifier():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "STORIES", 1000)
        yield
