"""Prompts cut to the image tokens that are left."""

import pytest
import torch

from vwt.errors import ArgumentError
from vwt.models.prompts import cut_prompts

IDS = torch.tensor([[1, 9, 9, 2, 9, 9, 3], [0, 0, 0, 1, 9, 9, 4]])  # 9 for an image token, two an image
KEPT = torch.tensor([True, False, False, True, True, True])


def test_padding_on_the_left():
    mask = (IDS != 0).long()
    cut = cut_prompts({"input_ids": IDS, "attention_mask": mask, "labels": 10 * IDS, "other": "stays"}, KEPT, 9, 7)
    assert cut["input_ids"].tolist() == [[1, 9, 2, 9, 3], [7, 1, 9, 9, 4]]
    assert cut["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert cut["labels"].tolist() == [[10, 90, 20, 90, 30], [-100, 10, 90, 90, 40]]
    assert cut["other"] == "stays"


def test_padding_on_the_right_stays_there():
    ids = torch.tensor([[1, 9, 9, 2, 9, 9, 3], [1, 9, 9, 4, 0, 0, 0]])
    positions = torch.arange(7).expand(2, -1)
    given = {"input_ids": ids, "attention_mask": (ids != 0).long(), "position_ids": positions}
    cut = cut_prompts(given, KEPT, 9, 0)
    assert cut["input_ids"].tolist() == [[1, 9, 2, 9, 3], [1, 9, 9, 4, 0]]
    assert cut["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert cut["position_ids"].tolist() == [[0, 1, 3, 5, 6], [0, 1, 2, 3, 0]]


def test_a_mask_is_made_where_prompts_differ():
    ids = torch.tensor([[1, 9, 9, 2], [1, 9, 9, 3]])
    cut = cut_prompts({"input_ids": ids}, torch.tensor([True, False, True, True]), 9, 0)
    assert cut["input_ids"].tolist() == [[0, 1, 9, 2], [1, 9, 9, 3]]
    assert cut["attention_mask"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    equal = cut_prompts({"input_ids": ids}, torch.tensor([True, False, False, True]), 9, 0)
    assert equal["input_ids"].tolist() == [[1, 9, 2], [1, 9, 3]]
    assert "attention_mask" not in equal


def test_wrong_inputs():
    with pytest.raises(ArgumentError, match="the prompt has 6 image tokens, the images have 5 features"):
        cut_prompts({"input_ids": IDS}, KEPT[:5], 9, 0)
    with pytest.raises(ArgumentError, match=r"labels is \(2, 3\), input_ids are \(2, 7\); expected one for each token"):
        cut_prompts({"input_ids": IDS, "labels": IDS[:, :3]}, KEPT, 9, 0)
    with pytest.raises(ArgumentError, match="attention_mask is dict, input_ids are"):
        cut_prompts({"input_ids": IDS, "attention_mask": {}}, KEPT, 9, 0)
