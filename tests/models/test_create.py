import pytest

from vwt.errors import ModelError
from vwt.models.create import create_model


def test_random_weights_need_no_hub():
    assert not create_model("test_vit", weights=False).training


def test_a_model_that_cannot_be_made_is_not_said_to_lack_weights():
    with pytest.raises(ModelError, match=r"timm \S+ cannot make test_vit\.of_the_future: ") as error:
        create_model("test_vit.of_the_future", weights=False)
    assert "weights" not in str(error.value)
