import pytest
import timm
import torch
from safetensors.torch import save_file

from vwt.errors import ModelError
from vwt.models.create import create_model


def test_random_weights_need_no_hub():
    assert not create_model("test_vit", weights=False).training


def test_a_model_that_cannot_be_made_is_not_said_to_lack_weights():
    with pytest.raises(ModelError, match=r"timm \S+ cannot make test_vit\.of_the_future: ") as error:
        create_model("test_vit.of_the_future", weights=False)
    assert "weights" not in str(error.value)


def test_options_with_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    made = timm.create_model("test_vit")
    save_file(made.state_dict(), tmp_path / "weights.safetensors")
    model = create_model("test_vit", tmp_path / "weights.safetensors", img_size=(64, 96))
    assert model.pos_embed.shape[1] == 1 + 4 * 6
    torch.testing.assert_close(model.pos_embed[:, 0], made.pos_embed[:, 0])
    assert torch.equal(model.head.weight, made.head.weight)
    with pytest.raises(ModelError, match=r"holds no weights for test_vit: Error.*: size mismatch for head\.weight"):
        create_model("test_vit", tmp_path / "weights.safetensors", num_classes=7)
