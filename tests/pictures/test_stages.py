import errno

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from tests.matrix import matrix
from vwt import Codebook, InterImage, Merge, Neighbours, Prune, PruningSchedule, VWTokenizer
from vwt.errors import ArgumentError, DocumentError, MismatchError
from vwt.models.spec import PatchSpec
from vwt.pictures.figures import save_figure, subplots
from vwt.pictures.groups import colour_groups
from vwt.pictures.stages import NEAREST, SHOWN, _named, _outline, frequent, save_stages, stages, word_tiles
from vwt.tokens.patches import normalise, patchify
from vwt.tokens.words import Words, keep_patches


@pytest.fixture
def image():
    return torch.randint(0, 256, (3, 160, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def make_codebook(model, image, space, count=20):
    """Words that are patches of the image."""
    spec = PatchSpec.of(model)
    inputs = normalise(image[None], spec.mean, spec.std)
    with torch.no_grad():
        features = patchify(inputs, spec.patch_size) if space == "pixel" else model.patch_embed(inputs).flatten(1, -2)
    counts = torch.arange(count).roll(5)
    projection = spec.projection if space == "embedding" else {}
    return Codebook(
        features[0, :count].float(), counts, counts, space, spec.patch_size, spec.mean, spec.std, projection
    )


def test_stages_of_a_schedule(small_vit, image):
    schedule = PruningSchedule({1: Prune(12), 3: Merge(20)})
    fast = VWTokenizer(small_vit, Neighbours(0.2), schedule)
    first, pruned, merged = stages(fast, image)
    assert first.title == "enter the blocks: 81 tokens"
    assert pruned.title == "pruned in block 1: 69 tokens"
    assert merged.title == "merged in block 3: 49 tokens"
    assert [int(stage.words.counts[0]) for stage in (first, pruned, merged)] == [80, 68, 48]
    dropped = torch.ones(100, dtype=torch.bool)
    dropped[first.words.kept[0]] = False
    assert torch.equal(first.gone, dropped)
    # 13 tokens are in the mean, and with each the dropped patches that it stood for.
    mean = pruned.words.group[0] == 67
    assert torch.equal(pruned.gone, dropped | mean)
    assert int((mean & ~dropped).sum()) == 13
    assert torch.equal(merged.gone, pruned.gone)
    with torch.inference_mode():
        spec = PatchSpec.of(small_vit)
        _, words = fast.forward_features(normalise(image[None], spec.mean, spec.std), unmerge=False)
    assert torch.equal(merged.words.group, words.group)


@pytest.mark.parametrize("options", [{"drop": 0.2}, {"threshold": 0.7}], ids=repr)
def test_what_is_stood_for_is_gone(small_vit, image, options):
    (first,) = stages(VWTokenizer(small_vit, Neighbours(**options)), image)
    kept = [number for number, share in enumerate(first.words.weight[0].tolist()) if share > 0.5]
    assert (~first.gone).nonzero()[:, 0].tolist() == kept
    assert len(kept) == int(first.words.counts[0]) < 100


def test_of_a_word_that_is_the_mean_of_its_patches_none_is_gone(small_vit, image):
    image[:, 16:48] = image[:, :32]
    strategy = InterImage(make_codebook(small_vit, image, "pixel"), 0.01)
    (first,) = stages(VWTokenizer(small_vit, strategy), image)
    assert not first.gone.any()
    assert int(first.words.counts[0]) < 100


def test_stage_without_a_strategy(small_vit, image):
    (first, merged) = stages(VWTokenizer(small_vit, schedule=PruningSchedule({2: Merge(7)})), image)
    assert not first.gone.any()
    assert not merged.gone.any()
    assert int(merged.words.counts[0]) == 93


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


def test_groups_are_named_by_their_first_patch():
    words = Words(torch.tensor([[2, 0, 2, 1, 0, -1]]), torch.ones(1, 6), torch.tensor([3]), (2, 3))
    gone = torch.tensor([False, True, False, False, False, True])
    assert _named(words, gone).group.tolist() == [[0, -1, 0, 3, 1, -1]]


def test_outline_is_around_groups_of_several():
    """Of the patches a a / b a, the three of a have eight edges; b, alone, has none of its own."""
    _, ((axes,),) = subplots(1, 1)
    _outline(axes, Words(torch.tensor([[0, 0, 1, 0]]), torch.ones(1, 4), torch.tensor([2]), (2, 2)), (40, 20))
    (lines,) = axes.collections
    ends = {tuple(map(tuple, segment.tolist())) for segment in lines.get_segments()}
    left, middle, right, top, centre, bottom = -0.5, 9.5, 19.5, -0.5, 19.5, 39.5
    assert ends == {
        ((left, top), (middle, top)),
        ((middle, top), (right, top)),
        ((left, top), (left, centre)),
        ((left, centre), (middle, centre)),
        ((middle, centre), (middle, bottom)),
        ((right, top), (right, centre)),
        ((right, centre), (right, bottom)),
        ((middle, bottom), (right, bottom)),
    }


def test_nothing_is_outlined_where_all_are_alone():
    _, ((axes,),) = subplots(1, 1)
    _outline(axes, keep_patches(torch.tensor([[0, 2]]), (2, 2)), (4, 4))
    assert not axes.collections[0].get_segments()


def test_pixel_words_are_pictures(small_vit, image):
    codebook = make_codebook(small_vit, image, "pixel")
    tiles = word_tiles(VWTokenizer(small_vit), codebook, image[None, :, :16, :16])
    assert tiles.shape == (1, SHOWN, 3, 16, 16)
    assert frequent(codebook)[:3].tolist() == [4, 3, 2]  # counted 19, 18 and 17 times
    torch.testing.assert_close(tiles[0, 0], image[:, :16, 64:80] / 255, atol=1e-5, rtol=0)


def test_embedding_words_by_their_nearest_patches(small_vit, image):
    codebook = make_codebook(small_vit, image, "embedding", 6)
    tiles = word_tiles(VWTokenizer(small_vit), codebook, torch.stack([image.flip(2), image]))
    assert tiles.shape == (NEAREST, 6, 3, 16, 16)
    for place, word in enumerate(frequent(codebook).tolist()):
        assert torch.equal(tiles[0, place], image[:, :16, 16 * word : 16 * word + 16] / 255)
    patches = torch.stack([image.flip(2), image])
    with torch.no_grad():
        spec = PatchSpec.of(small_vit)
        features = small_vit.patch_embed(normalise(patches, spec.mean, spec.std)).flatten(1, -2).flatten(0, 1)
    likeness = normalize(codebook.words[frequent(codebook)], dim=1) @ normalize(features, dim=1).T
    second = likeness.argsort(dim=1, descending=True)[0, 1]
    expected = patchify(patches, (16, 16)).flatten(0, 1)[second].view(3, 16, 16) / 255
    assert torch.equal(tiles[1, 0], expected)


def test_words_of_another_model(small_vit, image):
    codebook = make_codebook(small_vit, image, "embedding")
    with torch.no_grad():
        small_vit.patch_embed.proj.weight.add_(0.1)
    with pytest.raises(MismatchError):
        word_tiles(VWTokenizer(small_vit), codebook, image[None])


@pytest.mark.parametrize("space", matrix(["pixel", "embedding"], "embedding"))
def test_picture(small_vit, image, space, tmp_path):
    codebook = make_codebook(small_vit, image, space)
    fast = VWTokenizer(small_vit, InterImage(codebook, 0.3), PruningSchedule({1: 10, 2: Merge(5), 3: 5}))
    sizes = []
    for shown, name in ((codebook, "with"), (None, "without")):
        save_stages(tmp_path / f"{name}.png", image, fast, shown, heading="heading")
        with Image.open(tmp_path / f"{name}.png") as picture:
            sizes.append(picture.size)
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 1000
    assert sizes[0][0] == sizes[1][0]
    assert sizes[0][1] > sizes[1][1]


def test_picture_of_one_channel(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", in_chans=1).eval()
    model.pretrained_cfg = model.pretrained_cfg | {"mean": (0.5,), "std": (0.5,)}
    save_stages(tmp_path / "grey.png", torch.zeros(1, 160, 160, dtype=torch.uint8), VWTokenizer(model, Neighbours(0.1)))
    assert (tmp_path / "grey.png").stat().st_size > 1000


def test_without_matplotlib(small_vit, image, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ArgumentError, match=r"pip install 'vwt\[plots\]'"):
        save_stages(tmp_path / "out.png", image, VWTokenizer(small_vit, Neighbours(0.1)))


def test_dropped_patches_are_dimmed_and_belong_to_no_word():
    """Here all but the first are dropped, which stays as it is."""
    picture = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    drawn = colour_groups(picture, keep_patches(torch.tensor([[0]]), (2, 2)))
    assert torch.equal(drawn[:, :16, :16], picture[:, :16, :16])
    grey = 0.3 * picture.mean(0, keepdim=True).expand(3, -1, -1)
    assert torch.equal(drawn[:, 16:], grey[:, 16:])
    assert torch.equal(drawn[:, :, 16:], grey[:, :, 16:])


def test_a_disk_that_is_full_leaves_the_old_picture(tmp_path, monkeypatch):
    figure, _ = subplots(1, 1)
    path = tmp_path / "picture.png"
    save_figure(figure, path)
    before = path.read_bytes()

    def fill(self, fresh, **options):
        fresh.write_bytes(before[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(figure), "savefig", fill)
    with pytest.raises(DocumentError, match=r"cannot draw .*picture\.png: No space left on device"):
        save_figure(figure, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
