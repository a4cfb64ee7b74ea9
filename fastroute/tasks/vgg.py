"""VGG-11 with a task router after every convolution and a two-way head per task (Strezoski et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..functional import grouped_linear
from ..modules import watching
from ..modules.reading import may_be_read, reset, signature
from ..ops import checks, dispatch
from ..ops.arguments import Several, checked
from ..ops.task_mask.op import of_all
from .active_task import Task, TaskAware, aware_parts, on_device, traced, unless_refused
from .live_execution import called
from .live_model import LiveSequential
from .masks import Sigma as Sigma
from .pretrained import Pretrained as Pretrained
from .pretrained import load_features, read
from .router import TaskRouter

#: Configuration "A" of Simonyan and Zisserman (2015): the channels of each convolution; "M" is a pooling by two.
cfg: dict[str, list[int | Literal["M"]]] = {"A": [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"]}


@checked
def make_layers(
    cfg: Iterable[int | str],
    task_count: Several,
    sigma: Sigma,
    batch_norm: bool = False,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **masks: Any,
) -> nn.Sequential:
    """Convolution, batch norm if asked for, router and ReLU for every number in ``cfg``; a pooling by two for an "M".

    Args:
        cfg: such as ``cfg["A"]``; the first convolution takes 3 channels.
        task_count: T.
        sigma: the fraction of channels that each task does without, from 0 to 1.
        device, dtype: of the parameters; masks are float32.
        masks: ``generator``, ``no_orphans`` and ``balanced`` of :class:`TaskRouter`.

    Raises:
        ValueError, TypeError: ``cfg`` has something else in it, ``sigma`` is no fraction.
    """

    def router(width: int, name: str) -> TaskRouter:
        # neither a convolution nor a batch norm needs its output again: the router may write into it
        return TaskRouter(width, task_count, _fraction(sigma), name, inplace=True, device=device, **masks)

    return layers(cfg, batch_norm, router, device, dtype)


def layers(
    cfg: Iterable[int | str], batch_norm: bool, router: Callable[[int, str], nn.Module],
    device: torch.device | str | None = None, dtype: torch.dtype | None = None,
) -> nn.Sequential:  # fmt: skip
    """``make_layers`` with any routers: ``router(channels, name)``."""
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    made: list[nn.Module] = []
    channels = 3
    for position, entry in enumerate(cfg):
        if entry == "M":
            made.append(nn.MaxPool2d(kernel_size=2, stride=2))
            continue
        if isinstance(entry, str):
            raise ValueError(f'cfg: expected numbers of channels and "M", got {entry!r} at {position}')
        width = checks.at_least_one("cfg", entry)
        made.append(nn.Conv2d(channels, width, kernel_size=3, padding=1, **factory))
        if batch_norm:
            made.append(nn.BatchNorm2d(width, **factory))
        made += [router(width, f"taskrouter_{position}"), nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*made)


def _fraction(sigma: float) -> float:
    """VGG's sigma is a fraction even as an int: 1 is all channels."""
    return float(sigma) if type(sigma) is int else sigma


class VGG(TaskAware):
    """Features through which every task goes its own way, and for every task a linear head with two outputs.

    Args:
        features: the convolutions: a Sequential with routers in it, as :func:`make_layers` makes, or any module. What
            it gives has as many channels as its last convolution.
        task_count: T, the number of heads ``classifier_0``, ``classifier_1``, ...
        init_weights: convolutions normal by Kaiming (fan out), batch norms 1 and 0, heads normal of std 0.01, biases 0.
        active_task: the task to begin with, of this and of the routers in ``features``.
        bottleneck_spatial: height and width that features are pooled to (on average) before the heads.
        unused_grad: of the heads of tasks that are not in a batch: "none" leaves their gradients None, so that
            optimizers skip them, as upstream; "zeros" makes them zeros, which DistributedDataParallel needs (it stops
            at parameters without a gradient). Under torch.compile, and on a GPU for a tensor of tasks, they are zeros
            in any case.
        device, dtype: of the heads.

    Upstream's state-dict keys: ``features.{i}.*`` and ``classifier_{t}.0.*``. (Its heads of 1024 h w inputs never
    fitted its features; these take as many as there are.)

    Raises:
        ValueError, TypeError, IndexError: naming the argument.

    Examples:
        >>> features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), fastroute.TaskRouter(8, 4, 0.5), nn.ReLU())
        >>> net = fastroute.VGG(features, task_count=4, bottleneck_spatial=(2, 2))
        >>> net(torch.randn(2, 3, 16, 16), torch.tensor([0, 3])).shape
        torch.Size([2, 2])
    """

    @checked
    def __init__(
        self,
        features: nn.Module,
        task_count: Several = 10,
        init_weights: bool = True,
        active_task: Task = 0,
        bottleneck_spatial: Annotated[Sequence[int], None] = (7, 7),
        *,
        unused_grad: Literal["none", "zeros"] = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.task_count = task_count
        height, width = _height_and_width(bottleneck_spatial)
        self.unused_grad = unused_grad
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d((height, width))
        inputs = _last_channels(features) * height * width
        for t in range(self.task_count):
            setattr(self, f"classifier_{t}", nn.Sequential(nn.Linear(inputs, 2, device=device, dtype=dtype)))
        self._initializes = bool(init_weights)
        if init_weights:
            self._initialize_weights()
        self._hold(0)
        if isinstance(active_task, Tensor) or active_task != 0:
            self.set_active_task(active_task)

    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _heads(self) -> list[nn.Linear] | None:
        """The heads' linear modules, which run together where a batch is of several tasks; None if they cannot."""
        heads: list[Any] = []
        for t in range(self.task_count):
            head: Any = self.get_layer(f"classifier_{t}")
            if type(head) is nn.Sequential and len(head) == 1 and may_be_read(head):
                head = head[0]
            if type(head) is not nn.Linear or not may_be_read(head):
                return None
            heads.append(head)
        same = signature(heads[0])[2]
        return heads if all(signature(head)[2] == same for head in heads) else None

    def get_layer(self, name: str) -> Any:
        """The attribute of that name."""
        return getattr(self, name)

    def set_active_task(self, active_task: Task) -> Task:
        """Work on a task from now on, heads and routers alike, see :func:`set_task`; returns it."""
        aware, others = aware_parts(self.features)
        with unless_refused((self, *aware, *others)):
            task = super().set_active_task(active_task)
            for part in (*aware, *others):
                part.set_active_task(task)
        return task

    def forward(self, x: Tensor, task: Task | None = None) -> Tensor:
        """Two logits per image.

        Args:
            x: [B, 3, H, W], H and W at least 32 for the features of ``vgg11``.
            task: an int or an integer tensor, 0-d or [1]: the task of all images; or [B] integers: each image's own.
                By default the active task, in every router and for the heads.

        Returns:
            [B, 2]. In training, a batch norm's statistics are those of the whole batch, whatever its tasks.

        Raises:
            IndexError, TypeError, ValueError: as :class:`TaskRouter`; images too small for the poolings.
        """
        checks.tensor("x", x, "a tensor [B, 3, H, W]")
        task = of_all(task)
        if isinstance(task, Tensor) and task.dim() == 1 and (x.dim() < 1 or task.shape[0] != x.shape[0]):
            raise ValueError(
                f"task: expected an int or one task per sample, shape {list(x.shape[:1])}, got {checks.shown(task)}"
            )
        try:
            x = checks.as_parameters("x", x, self, _routed, self.features, x, task)
        except RuntimeError as error:
            least = _least(self.features)
            if x.dim() == 4 and (x.shape[2] < least or x.shape[3] < least):
                raise ValueError(f"x: expected images of {least} x {least} or larger, got {checks.shown(x)}") from error
            raise
        x = torch.flatten(self.avgpool(x), 1)
        active = self._task(task)
        watching.tell(self, "tasks", active, x, self.task_count)
        return self._checked(self._classify(x, active), task)

    def _classify(self, x: Tensor, task: Task) -> Tensor:
        """The heads of the tasks, in one grouped product unless there is but one."""
        if not traced():  # numbers are known
            if isinstance(task, Tensor) and task.dim() == 0 and task.device.type == "cpu" and type(task) is Tensor:
                task = int(task)
            if not isinstance(task, Tensor) and self.unused_grad == "none":
                return self.get_layer(f"classifier_{task}")(x)
        heads = self._heads()
        if heads is None:
            return self._classify_each(x, on_device(task, x.device).expand(x.shape[0]))
        weights: list[Tensor] = [head.weight for head in heads]
        biases: list[Tensor] = [head.bias for head in heads if head.bias is not None]
        tasks = on_device(task, x.device).expand(x.shape[0]).contiguous()
        if traced() and not torch.compiler.is_compiling():  # vmap has no rule for the grouped product
            y = (torch.stack(weights)[tasks] @ x[..., None])[..., 0]
            return y + torch.stack(biases)[tasks] if biases else y
        plan = dispatch.plan(tasks, self.task_count, "task")
        return grouped_linear(x, plan, weights, biases, keep_empty=self.unused_grad == "zeros")

    def _classify_each(self, x: Tensor, task: Tensor) -> Tensor:
        """Every head called with the samples of its task."""
        plan = dispatch.plan(task.contiguous(), self.task_count, "task")
        bounds, x = dispatch.bounds_of(plan), x.index_select(0, plan.order)
        parts = [
            self.get_layer(f"classifier_{t}")(x[a:b])
            for t, (a, b) in enumerate(pairwise(bounds))
            if a < b or (t == self.task_count - 1 and not bounds[-1])
        ]
        made = torch.cat(parts)
        if self.unused_grad == "zeros":  # a part of no elements has a gradient of zeros
            every = [p for t in range(self.task_count) for p in self.get_layer(f"classifier_{t}").parameters()]
            made = made + torch.cat([made.new_zeros(0), *(p.flatten()[:0].to(made.dtype) for p in every)]).sum()
        return made.new_zeros(x.shape[0], made.shape[1]).index_copy(0, plan.order[: len(made)], made)

    def reset_parameters(self) -> None:
        """Draw all parameters, and the routers' masks, anew, as they were drawn at first."""
        reset(*(module for module in self.modules() if module is not self))
        if self._initializes:
            self._initialize_weights()

    def _initialize_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.01)
                nn.init.zeros_(module.bias)


def _routed(module: nn.Module, x: Tensor, task: Task | None) -> Tensor:
    """``module(x)``, with a task for what takes one: routers, in a Sequential or in Sequentials in it."""
    if task is None:
        return module(x)
    if hasattr(type(module), "set_active_task"):
        return module(x, task)
    if type(module) is nn.Sequential and may_be_read(module):
        for layer in module:
            x = _routed(layer, x, task)
        return x
    aware, others = aware_parts(module)
    if type(module) is nn.Sequential and all(isinstance(other, LiveSequential) for other in others):
        return called(module, x, task)
    if aware or others:
        raise TypeError(
            f"task: expected routers in nn.Sequentials, to hand it to, got some inside a {type(module).__name__}; "
            f"set the task beforehand with set_task"
        )
    return module(x)


def _height_and_width(bottleneck_spatial: Sequence[int]) -> tuple[int, int]:
    try:
        height, width = bottleneck_spatial
    except (TypeError, ValueError):
        raise ValueError(f"bottleneck_spatial: expected [height, width], got {bottleneck_spatial!r}") from None
    return checks.at_least_one("bottleneck_spatial", height), checks.at_least_one("bottleneck_spatial", width)


def _least(features: nn.Module) -> int:
    """The smallest side of an image of which poolings leave something."""
    side = 1
    for m in features.modules():
        if isinstance(m, nn.MaxPool2d):
            side *= m.stride if isinstance(m.stride, int) else max(m.stride)
    return side


def _last_channels(features: nn.Module) -> int:
    for module in reversed(list(features.modules())):
        if isinstance(module, nn.Conv2d):
            return module.out_channels
    raise ValueError("features: expected a module with an nn.Conv2d in it, got none")


# ------------------------------------------------------------------------------------------------------ the models


@checked
def vgg11(
    pretrained: Pretrained = False,
    task_count: Several = 10,
    sigma: Sigma = 0.5,
    *,
    generator: torch.Generator | None = None,
    no_orphans: bool = False,
    balanced: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> VGG:
    """VGG-11 with task routing.

    Args:
        pretrained: False, or the path of torchvision's state dict of vgg11, from which convolutions are taken.
        task_count: T.
        sigma: the fraction of channels that each task does without, in every layer.
        generator, no_orphans, balanced: how masks are drawn, see :class:`TaskRouter`.
        device, dtype: of the parameters.
        kwargs: of :class:`VGG`.

    Raises:
        FileNotFoundError, ValueError: about ``pretrained``; ValueError, TypeError: naming the argument.

    Examples:
        >>> net = fastroute.vgg11(task_count=3, sigma=0.5, device="meta")  # on a real device: 32 x 32 images and larger
        >>> len([m for m in net.modules() if isinstance(m, fastroute.TaskRouter)])
        8
    """
    masks: dict[str, Any] = {"generator": generator, "no_orphans": no_orphans, "balanced": balanced}
    own: dict[str, Any] = {"device": device, "dtype": dtype}
    features = partial(make_layers, cfg["A"], task_count, sigma, False, **masks, **own)
    return build(VGG, "vgg11", features, pretrained, task_count, {**kwargs, **own})


@checked
def vgg11_bn(
    pretrained: Pretrained = False,
    task_count: Several = 10,
    sigma: Sigma = 0.5,
    *,
    generator: torch.Generator | None = None,
    no_orphans: bool = False,
    balanced: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> VGG:
    """VGG-11 with task routing and a batch norm after every convolution; as :func:`vgg11`.

    The arguments are :func:`vgg11`'s.

    Examples:
        >>> net = fastroute.vgg11_bn(task_count=3, sigma=0.5, device="meta")
        >>> len([m for m in net.modules() if isinstance(m, nn.BatchNorm2d)])
        8
    """
    masks: dict[str, Any] = {"generator": generator, "no_orphans": no_orphans, "balanced": balanced}
    own: dict[str, Any] = {"device": device, "dtype": dtype}
    features = partial(make_layers, cfg["A"], task_count, sigma, True, **masks, **own)
    return build(VGG, "vgg11_bn", features, pretrained, task_count, {**kwargs, **own})


Model = TypeVar("Model", bound=VGG)


def build(
    cls: type[Model], name: str, features: Callable[[], nn.Module], pretrained: bool | str | Path, task_count: Several,
    kwargs: dict[str, Any],
) -> Model:  # fmt: skip
    """A model, or what is wrong with ``pretrained`` before any work."""
    weights = read(pretrained, name)
    if weights is None:
        return cls(features(), task_count, **kwargs)
    model = cls(features(), task_count, **{**kwargs, "init_weights": False})
    load_features(model.features, weights, name)
    return model
