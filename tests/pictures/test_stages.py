import pytest
import torch

from tests.pictures.conftest import make_codebook
from vwt import InterImage, Merge, Neighbours, Prune, PruningSchedule, VWTokenizer
from vwt.models.spec import prepare
from vwt.pictures.stages import DROPPED, keepers, stages
from vwt.tokens.words import Words


def test_stages_of_a_schedule(small_vit, image):
    schedule = PruningSchedule({1: Prune(12), 3: Merge(20)})
    fast = VWTokenizer(small_vit, Neighbours(0.2), schedule)
    first, pruned, merged = stages(fast, image)
    assert [stage.title for stage in (first, pruned, merged)] == [
        "enter the blocks: 81 tokens",
        "pruned in block 1: 69 tokens",
        "merged in block 3: 49 tokens",
    ]
    assert [stage.block for stage in (first, pruned, merged)] == [None, 1, 3]
    assert (first.keeper != DROPPED).all()
    # 13 tokens are in the mean, and with each the dropped patches that it stood for.
    gone = pruned.keeper == DROPPED
    assert len(first.keeper[gone].unique()) == 13
    assert torch.equal(pruned.keeper[~gone], first.keeper[~gone])
    assert torch.equal(merged.keeper == DROPPED, gone)
    with torch.inference_mode():
        _, words = fast.forward_features(prepare(image[None], small_vit), unmerge=False)
    kept = merged.keeper[~gone]
    same = words.group[0][~gone]
    assert torch.equal(kept[:, None] == kept, same[:, None] == same)


@pytest.mark.parametrize("options", [{"drop": 0.2}, {"threshold": 0.7}], ids=repr)
def test_a_patch_that_stands_for_others_is_their_keeper(small_vit, image, options):
    fast = VWTokenizer(small_vit, Neighbours(**options))
    (first,) = stages(fast, image)
    words = fast.tokenize(prepare(image[None], small_vit))
    heavy = (words.weight[0] > 0.5).nonzero()[:, 0]
    assert torch.equal(first.keeper.unique(), heavy)
    assert len(heavy) == int(words.counts[0]) < 100
    assert first.shared == {int(patch) for patch in heavy if (first.keeper == patch).sum() > 1}


def test_the_first_patch_of_a_mean_is_its_keeper(small_vit, image):
    image[:, 32:64] = image[:, :32]
    strategy = InterImage(make_codebook(small_vit, image, "pixel"), 0.01)
    (first,) = stages(VWTokenizer(small_vit, strategy), image)
    assert first.keeper[:40].tolist() == 2 * list(range(20))
    assert first.tokens < 101


def test_stage_without_a_strategy(small_vit, image):
    first, merged = stages(VWTokenizer(small_vit, schedule=PruningSchedule({2: Merge(7)})), image)
    assert first.keeper.tolist() == list(range(100))
    assert not first.shared
    assert len(merged.keeper.unique()) == 93 == merged.tokens - 1


def test_a_reduction_that_does_not_happen_is_no_stage(small_vit, image):
    """Of the last block, only the class token goes through the MLP where the head reads nothing else."""
    small_vit.global_pool = "token"
    last = len(small_vit.blocks) - 1
    fast = VWTokenizer(small_vit, schedule=PruningSchedule({2: Merge(7), last: Merge(7)}), check=False)
    assert fast.backbone.reads_prefix_only
    assert [stage.title for stage in stages(fast, image)] == [
        "enter the blocks: 101 tokens",
        "merged in block 2: 94 tokens",
    ]


def test_keepers():
    group, weight = torch.tensor([[2, 0, 2, 1, 0, -1]]), torch.tensor([[0.2, 0.5, 0.8, 1.0, 0.5, 0.0]])
    words = Words(group, weight, torch.tensor([3]), (2, 3))
    assert keepers(words).tolist()[:5] == [2, 1, 2, 3, 1]
