from __future__ import annotations

from l3rs.descriptors import roles
from l3rs.spec import Layer


def test_roles_are_read_off_names_and_shapes() -> None:
    resnet = {
        "head/bias": 1,
        "head/kernel": 2,
        "stages/0/conv/kernel": 4,
        "stages/0/norm/scale": 1,
        "stages/0/norm/bias": 1,
        "stem/conv/kernel": 4,
    }
    found = roles([Layer(path, (3,) * rank) for path, rank in resnet.items()])
    assert [tuple(role) for role in found] == [
        ("output", "bias"),
        ("output", "kernel"),
        ("hidden", "kernel"),
        ("norm", "scale"),
        ("norm", "bias"),
        ("input", "kernel"),
    ]
    mlp = [f"layers/{i}/kernel" for i in (0, 1, 10, 2)]
    assert [role.place for role in roles([Layer(path, (3, 3)) for path in mlp])] == [
        "input",
        "hidden",
        "output",
        "hidden",
    ]
    assert roles([Layer("w", (3,))]) == [("norm", "scale")]
    vit = {
        "blocks/0/norm/scale": 1,
        "blocks/0/mlp/kernel": 2,
        "cls_token": 3,
        "head/kernel": 2,
        "patch_embed/kernel": 4,
    }
    found = roles([Layer(path, (3,) * rank) for path, rank in vit.items()])
    assert [role.place for role in found] == ["norm", "hidden", "input", "output", "input"]
    torch = {"conv1.weight": 4, "bn1.weight": 1, "layer1.0.conv1.weight": 4, "fc.weight": 2, "fc.bias": 1}
    found = roles([Layer(path, (3,) * rank) for path, rank in torch.items()])
    assert [role.place for role in found] == ["input", "norm", "hidden", "output", "output"]
