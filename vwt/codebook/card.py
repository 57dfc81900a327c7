"""The model card of a codebook, from its provenance."""

from typing import Any

from vwt.hub import Card


def make_card(
    repository: str, shape: tuple[int, ...], space: str, patch_size: tuple[int, int], provenance: dict[str, Any]
) -> Card:
    """The card of a codebook in a repository `user/name`.

    Args:
        repository: where it will be.
        shape: (K, D) of the words.
        space: "pixel" or "embedding".
        patch_size: (height, width) in pixels.
        provenance: see `Codebook`.
    """
    facts: dict[str, Any] = {"words": shape[0], "width": shape[1], "space": space, "patch": "{}x{}".format(*patch_size)}
    for name, value in provenance.items():
        facts |= {f"{name}: {key}": own for key, own in value.items()} if isinstance(value, dict) else {name: value}
    model = provenance.get("model") or "NAME"
    serves = f"for {model}" if space == "embedding" else "for every model of this patch size"
    return Card(
        about=f"{shape[0]} visual words in {space} space, {serves}. With them, `vwt` makes one token of all patches of "
        "an image that have the same nearest word.",
        tags=("visual-words", space),
        facts={name: value for name, value in facts.items() if value is not None},
        usage=f'codebook = vwt.Codebook.from_pretrained("{repository}")\n'
        f'model = timm.create_model("{model}", pretrained=True).eval()\n'
        "fast = vwt.VWTokenizer(model, vwt.InterImage(codebook, threshold=0.1))",
    )
