"""Every layer by AOTInductor, from a program of torch.export: the numbers of eager, at another batch size, too.

One program has all layers, so that their headers are compiled once; each layer's results in it are compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import fastroute
from tests.helpers.layers import LAYERS
from tests.helpers.matrix import IN_REFERENCE, cell, tried

AOTI = "AOTInductor"


class Together(nn.Module):
    """All layers; those of ``IN_REFERENCE`` in PyTorch's own ops."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names, self.layers = names, nn.ModuleList(LAYERS[name].layer().eval() for name in names)

    def forward(self, calls: list[Any]) -> list[Any]:
        made = []
        for name, layer, (args, options) in zip(self.names, self.layers, calls, strict=True):
            with fastroute.use_backend("reference" if name in IN_REFERENCE else "auto"):
                made.append(layer(*args, **options))
        return made


def longer(t: Tensor) -> Tensor:
    return torch.cat([t, t[:1], t])


def numbers(made: Any) -> list[Tensor]:
    return [t.detach() for t in tree_leaves(made) if isinstance(t, Tensor)]


def packaged(names: list[str], folder: Path) -> tuple[nn.Module, Any, list[Any]]:
    """(the layers, their compiled program, what each is called with); the program is for any batch size."""
    model = Together(names)
    calls = [((*LAYERS[name].inputs, *LAYERS[name].rest), LAYERS[name].options) for name in names]
    calls = tree_map_only(Tensor, torch.clone, calls)  # an input of two layers has a size for each
    shapes = torch.export.ShapesCollection()
    for t in tree_leaves(calls):
        shapes[t] = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (calls,), dynamic_shapes=shapes.dynamic_shapes(model, (calls,)))
    path = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(folder / "layers.pt2"),
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
    )
    return model, torch._inductor.aoti_load_package(path), calls


@pytest.mark.long
def test_all_layers_in_one_package(tmp_path: Path) -> None:
    names = tried(AOTI)
    model, compiled, calls = packaged(names, tmp_path)
    wrong = {}
    for given in (calls, tree_map_only(Tensor, longer, calls)):
        for name, made, expected in zip(names, compiled(given), model(given), strict=True):

            def run(made: Any = made, expected: Any = expected) -> None:
                for a, b in zip(numbers(made), numbers(expected), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

            try:
                cell(name, AOTI, run)
            except AssertionError as error:
                wrong[name] = str(error)
    assert not wrong


@pytest.mark.long
def test_an_empty_list_of_tensors(tmp_path: Path) -> None:
    """What AOTInductor says of one, here of the critics: such layers are compiled in PyTorch's own ops."""
    decide = fastroute.REINFORCE(3, 4)

    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decide = decide

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.decide(*fastroute.Initialization()(x))[2]
            return made

    x = torch.randn(5, 4)
    program = torch.export.export(Decides().eval(), (x,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "decides.pt2"))
    with pytest.raises(RuntimeError, match=r"isList\(\) INTERNAL ASSERT FAILED"):
        torch._inductor.aoti_load_package(path)(x)
