"""The table of docs/works_with.md: its columns, where each is tried, and the cells that are not a plain yes.

A column that another test module tries is one more ``Column``; that test goes over ``tried(title)`` and runs each of
its cells in ``cell``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest

from tests.helpers.layers import LAYERS


class Column(NamedTuple):
    title: str
    what: str
    where: str  #: the test module


BASICS, STATE, DERIVATIVES, ADAPTED, SHARED = "works_with", "state", "derivatives", "adapted", "sharded"
COLUMNS = (
    Column("deepcopy", "`copy.deepcopy`: the same values, no memory in common", BASICS),
    Column("pickle", "`pickle` of the module", BASICS),
    Column("weights_only", "`torch.save` of the state dict, `torch.load(weights_only=True)`, strict", BASICS),
    Column(
        "safetensors",
        "`safetensors.torch.save_model` and `load_model`, and `save_file` of the state dict, strictly into another "
        "layer: the same outputs",
        STATE,
    ),
    Column(
        "meta",
        'made under `torch.device("meta")`, then `load_state_dict(assign=True)`: the same outputs; or `to_empty` and '
        "`reset_parameters` of every module: all state, from the same distribution; calls on meta tensors give shapes",
        STATE,
    ),
    Column("compile", "`torch.compile(fullgraph=True)`, values and gradients", BASICS),
    Column("dynamic", "the same with `dynamic=True`", BASICS),
    Column("export", "`torch.export.export`", BASICS),
    Column(
        "AOTInductor",
        "`torch._inductor.aoti_compile_and_package` of what `torch.export` gives in eval for any batch size, loaded "
        "and run, also with other weights (`load_constants`)",
        "onnx",
    ),
    Column("ONNX", "`torch.onnx.export(dynamo=True)` in eval, run by onnxruntime, for any batch size", "onnx"),
    Column("autocast", "`torch.autocast` to bfloat16", BASICS),
    Column("fp64", "the module in float64, its gradients against finite differences", BASICS),
    Column("bf16", "the module in bfloat16, with gradients", BASICS),
    Column("fp16", "the module in float16, with gradients", BASICS),
    Column("inference", "`torch.inference_mode`, and training after it", BASICS),
    Column("EMA", "`torch.optim.swa_utils.AveragedModel`", BASICS),
    Column("threads", "first calls from four threads at once, to the bit", BASICS),
    Column("fake", "made and trained under `FakeTensorMode`: the shapes of outputs and of gradients", BASICS),
    Column("grad", "`torch.func.functional_call`, alone and under `torch.func.grad`", DERIVATIVES),
    Column("vmap", "ensembles by `vmap`, and `vmap(grad)` for each sample", DERIVATIVES),
    Column("jvp", "forward mode", DERIVATIVES),
    Column("2nd", "second derivatives (`create_graph=True`, Jacobians, Hessians)", DERIVATIVES),
    Column(
        "checkpoint",
        "`torch.utils.checkpoint`, both kinds, to the bit. A policy may save all operators, but for `RELAX`, which "
        "takes a gradient in its forward pass, and where PyTorch's own modules write to results: GRUCell "
        "(`SlotAttention`), BatchNorm, `inplace=True`. PyTorch then says so.",
        DERIVATIVES,
    ),
    Column("hooks", "forward and backward hooks of all kinds on every module, own and global", ADAPTED),
    Column("tensor hooks", "hooks on parameters: of their gradients, and after they are accumulated", ADAPTED),
    Column(
        "parametrized",
        "`parametrize`, `weight_norm`, `spectral_norm` and `prune` on every parameter in turn",
        ADAPTED,
    ),
    Column("LoRA", "`peft` on every `nn.Linear`: as with the merged weights, and the adapters get gradients", ADAPTED),
    Column("torchao", "torchao's int8 weight-only quantization of every `nn.Linear`", ADAPTED),
    Column("quantize_dynamic", "`torch.ao.quantization.quantize_dynamic` of every `nn.Linear`", ADAPTED),
    Column("DDP", "two steps of `DistributedDataParallel` on two processes: the weights of one process", SHARED),
    Column("FSDP2", "the same with `fully_shard`", SHARED),
)
TITLES = [c.title for c in COLUMNS]

_IN_PLACE = (
    "is a view and is being modified inplace. This view was created inside a custom Function (or because an input was "
    "returned as-is)"
)
_OF_ESTIMATOR = (
    "The gradient is the straight-through estimator's, by definition not the slope of the output: there are no "
    "differences to compare it with."
)
_BY_DEFINITION = (
    "Terms of the losses are constants to the gradient, by definition: there are no differences to compare it with."
)
#: What does not work: (layer, column) and what is said.
REFUSED: dict[tuple[str, str], str] = {
    ("compat.heinsen_routing_2019", "hooks"): (
        "f: expected the Sigmoid that the layer was made with, which is computed and not called, got another Sigmoid, "
        "or one with hooks or a forward of its own"
    ),
    ("VGG", "hooks"): _IN_PLACE,
    ("Selection, stacked", "quantize_dynamic"): "linear_prepack (fbgemm) should be 2-dimensional",
    ("Selection, stacked", "LoRA"): (
        "stacked: expected the parameters that the modules had, parametrized or pruned, got 0.base_layer.weight too, "
        "which cannot be told apart by module; make the layer with stacked=False"
    ),
}
REFUSED |= {
    ("RELAX", title): "RELAX: expected a call in eval under torch.func and forward mode; its loss is made of a gradient"
    for title in ("grad", "vmap", "jvp")
}
REFUSED["AAC, WPL that collaborate", "checkpoint"] = (
    "CollaborationReward: expected the loss outside of what is checkpointed: a forward pass that is made "
    "again would count other actions than the first one did"
)
REFUSED["RELAX", "inference"] = (
    "RELAX: expected torch.no_grad instead of torch.inference_mode; its loss is made of a gradient"
)
REFUSED |= {
    (name, title): "Could not guard on data-dependent expression"
    for name in ("Selection, unlike modules", "RELAX")
    for title in ("compile", "dynamic")
}
REFUSED |= {(name, "fake"): "aten._local_scalar_dense.default" for name in ("Selection, unlike modules", "RELAX")}
WITHOUT_LINEAR = (
    "EfficientVectorRouting", "EfficientVectorRouting, masked", "GenerativeMatrixRouting",
    "GenerativeMatrixRouting, any number", "compat.heinsen_routing_2019", "Selection, convolutions", "MMoE", "PLE",
    "CrossStitch", "CrossStitch, by channel", "MultiHead",
)  # fmt: skip
OF_LINEARS = ("LoRA", "torchao", "quantize_dynamic")
#: What is not tried, and why: (layer, column).
LIMITS: dict[tuple[str, str], str] = {
    **{(name, title): "It has no `nn.Linear`." for name in WITHOUT_LINEAR for title in OF_LINEARS},
    ("RoutedConv2d, RoutedLinear", "LoRA"): (
        "peft adds an adapter's output beside that of the layer, here the masked one: the sum is not masked."
    ),
    ("RoutedConv2d, RoutedLinear", "quantize_dynamic"): "It has no `nn.Linear`.",
    **{
        (name, "ONNX"): "It returns the losses of a training step. Routed networks without them are tried."
        for name in (
            "REINFORCE, twice",
            "QLearning, tabular",
            "GumbelSoftmax",
            "AAC, WPL that collaborate",
            "the other decisions",
            "RELAX",
        )
    },
    **{
        (name, title): _BY_DEFINITION
        for name in ("AAC, WPL that collaborate", "the other decisions", "RELAX", "every weighting")
        for title in ("fp64", "2nd")
    },
    **{
        ("the other decisions", title): "Policies and critics are those of the decisions above."
        for title in ("hooks", "parametrized", *OF_LINEARS)
    },
    ("the other decisions", "FSDP2"): (
        "Ranks ask different agents, and `fully_shard` needs a gradient of each parameter on every rank: "
        "`fastroute.distributed.prepare` sees to it."
    ),
    ("GumbelSoftmax", "fp64"): _OF_ESTIMATOR,
    ("GumbelSoftmax", "2nd"): _OF_ESTIMATOR,
}
#: Layers that count in training, in buffers that torch.func may not change: what is said. In eval they work.
IN_EVAL: dict[str, str] = {
    "MoE, balanced by bias": "counts: expected a call in eval, or buffers that are given to functional_call as the "
    "parameters are: torch.func cannot change a buffer of the module",
    **dict.fromkeys(
        ("live, convolutions and BatchNorm", "every weighting", "models.RoutedCNN"),
        "attempted to call in-place operation (aten::add_.Tensor) that would mutate a captured Tensor",
    ),
}
OF_FUNC = ("grad", "vmap", "jvp", "2nd")


#: Public modules that have no row, by the start of their full name, and why.
WITHOUT_ROW: dict[str, str] = {
    "fastroute.compat.": "classes of `fastroute.compat` differ from those here in a formula; upstream's `TaskRouter` "
    "also writes into its argument behind autograd's back, as upstream does",
    "fastroute.distributed.": "layers of `fastroute.distributed` run in several processes: `tests/distributed`",
    "fastroute.models.capsule_head.CapsuleClassifier": "`models.CapsuleClassifier` is an encoder of the user's and a "
    "`CapsuleHead`",
    "fastroute.models.small_norb.SmallNORB": "`models.SmallNORB` is convolutions and `GenerativeMatrixRouting`",
    "fastroute.multitask.metrics.": "metrics count",
}


def tried(*titles: str) -> list[str]:
    """The layers that have something to try in these columns."""
    assert set(titles) <= set(TITLES)
    return [name for name in LAYERS if not all((name, title) in LIMITS for title in titles)]


def each(title: str) -> pytest.MarkDecorator:
    """The layers of a column's test, as ``name``."""
    of = [pytest.param(name, marks=[pytest.mark.long] if LAYERS[name].long else []) for name in tried(title)]
    return pytest.mark.parametrize("name", of)


def cell(name: str, title: str, run: Callable[[], object]) -> None:
    """Run what a cell says, or see that it is refused as the table says."""
    said = REFUSED.get((name, title))
    if said is None:
        run()
        return
    with pytest.raises(Exception, match=re.escape(said)):
        run()


def page() -> str:
    notes: list[str] = []

    in_eval = {(name, title): said for name, said in IN_EVAL.items() for title in OF_FUNC}

    def shown(name: str, title: str) -> str:
        for mark, told in (("no", REFUSED), ("–", LIMITS), ("eval", in_eval)):
            said = told.get((name, title))
            if said is not None:
                if said not in notes:
                    notes.append(said)
                return f"{mark} ({notes.index(said) + 1})"
        return "yes"

    rows = [f"| {name} | " + " | ".join(shown(name, title) for title in TITLES) + " |" for name in LAYERS]
    places = ", ".join(f"`tests/test_{where}.py`" for where in dict.fromkeys(c.where for c in COLUMNS))
    parts = [
        "# What works with what",
        f"Each cell is a test, on a CPU, with small layers: {places}.\n"
        "This page is written from the tests' table. What `fold` and `extract_task` give are plain modules of PyTorch, "
        "and have no row. Nor have others:",
        "\n".join(f"* {why}" for why in WITHOUT_ROW.values()),
        "\n".join(["| | " + " | ".join(TITLES) + " |", "|---" * (len(COLUMNS) + 1) + "|", *rows]),
        "\n".join(f"* **{c.title}**: {c.what}" for c in COLUMNS),
    ]
    if notes:
        parts.append(
            '"no": what is said instead. "eval": so it is in eval, and in training this is said. "–": not tried, '
            "because:\n\n" + "\n".join(f"{i}. {said}" for i, said in enumerate(notes, 1))
        )
    return "\n\n".join(parts) + "\n"
