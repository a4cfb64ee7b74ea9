"""``EfficientVectorRouting``, Heinsen (2022), "An Algorithm for Routing Vectors in Sequences"."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import efficient_routing
from ..modules import watching
from ..modules.reading import Memo, Proof, call, may_be_read, reset
from ..ops import checks
from ..ops.arguments import Count, InputCount, Options, OutputCount, Several, checked
from ..ops.autograd import transformed
from ..ops.efficient_routing.contract import Parameters, check_sizes
from ..ops.efficient_routing.op import Functions, cast, first_or_next, input_scale
from ..ops.host import is_traced
from ..ops.masked import only, reaches, reaching
from ..ops.precision import autocast_dtype, autocast_off
from ..ops.vector_routing.op import row_is_live
from .stream import Chunks, stream

__all__ = ["EfficientVectorRouting"]

_OWN = itemgetter(*Parameters._fields[:12])  # of a layer with a fixed number of inputs


class EfficientVectorRouting(Options, nn.Module):
    r"""Routes n_inp vectors of width d_inp to n_out vectors of width d_out by n_iters iterations of agreement.

    In each iteration every output vector predicts the inputs (E-step), each input divides itself over the *outputs* by
    a softmax of how well it was predicted (D-step), and every output is the sum over *inputs* of votes weighted by net
    benefit less cost (M-step). Same parameters, names, initial values and order of random draws as
    ``heinsen_routing.EfficientVectorRouting``: a seed gives the same weights and state dicts load strictly both ways.

    Unlike there, no [n_inp, n_out] array is stored between forward and backward (``docs/vector_routing.md``), padded
    batches are understood (``lengths``), and an input masked for every output contributes zero instead of NaN.

    Args:
        n_inp: number of input vectors, or -1 for any number (benefits and costs are then linear in the input vector).
        n_out: number of output vectors, at least 2.
        d_inp, d_out: widths of input and output vectors.
        n_iters: iterations, at least 1.
        normalize: layer norm (without affine) over each output vector at the end; nothing when d_out is 1.
        memory_efficient: accepted for compatibility. Votes are never stored unless it is False *and* ``return_dict`` is
            True, which returns them; results are the same.
        return_dict: return a dict of the last iteration's arrays, ``phi`` among them, instead of x_out alone. Costs
            several [..., n_inp, n_out] arrays.
        device, dtype: of the parameters.

    Shapes:
        x_inp [..., n_inp, d_inp] of any leading dimensions, none and empty included; output [..., n_out, d_out] in the
        promoted dtype of x_inp and the parameters, float32 under autocast.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Examples:
        >>> route = fastroute.EfficientVectorRouting(n_inp=100, n_out=10, d_inp=64, d_out=32)
        >>> route(torch.randn(4, 100, 64)).shape
        torch.Size([4, 10, 32])
        >>> any_length = fastroute.EfficientVectorRouting(-1, 10, 64, 32)
        >>> any_length(torch.randn(4, 100, 64), lengths=[100, 31, 7, 100]).shape
        torch.Size([4, 10, 32])
    """

    CONST_ones_over_n_out: Tensor

    _options = ("n_iters", "normalize", "memory_efficient", "return_dict")
    _fixed = ("n_inp", "n_out", "d_out")

    @checked
    def __init__(
        self,
        n_inp: InputCount,
        n_out: OutputCount,
        d_inp: Count,
        d_out: Count,
        n_iters: Several = 2,
        normalize: bool = True,
        memory_efficient: bool = True,
        return_dict: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.n_inp, self.n_out, self.d_inp, self.d_out = n_inp, n_out, d_inp, d_out
        self.n_iters, self.normalize = n_iters, normalize
        self.memory_efficient, self.return_dict = memory_efficient, return_dict
        self._memo = Memo()

        rows = 1 if n_inp == -1 else n_inp
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def empty(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, **factory))

        # The order of these lines is the order of keys in a state dict.
        self.register_buffer("CONST_ones_over_n_out", torch.empty(n_out, **factory))
        self.W_A, self.B_A = empty(rows, d_inp), empty(rows)
        self.W_F1, self.W_F2, self.B_F2 = empty(n_out, d_inp), empty(d_inp, d_out), empty(n_out, d_out)
        self.W_G1, self.W_G2, self.B_G2 = empty(d_out, d_inp), empty(n_out, d_inp), empty(n_out, d_inp)
        self.W_S, self.B_S = empty(rows, n_out), empty(rows, n_out)
        if n_inp != -1:
            self.beta_use, self.beta_ign = empty(n_inp, n_out), empty(n_inp, n_out)
        self._draw()
        if n_inp == -1:
            self.compute_beta_use = nn.Linear(d_inp, n_out, **factory)
            self.compute_beta_ign = nn.Linear(d_inp, n_out, **factory)

        # Upstream's submodules without parameters. The op does what they do; they are called if they may not be read.
        self.N = nn.LayerNorm(d_out, elementwise_affine=False) if d_out > 1 else nn.Identity()
        self.f = nn.Sigmoid()
        self.log_f = nn.LogSigmoid()
        self.softmax = nn.Softmax(dim=-1)

    @torch.no_grad()
    def _draw(self) -> None:
        """The order of these lines is the order of random draws."""
        self.CONST_ones_over_n_out.fill_(1 / self.n_out)
        for biases in (self.B_A, self.B_F2, self.B_G2, self.B_S):
            biases.zero_()
        self.W_A.normal_(std=2 * self.d_inp**-0.5)
        self.W_F1.normal_()
        self.W_F2.normal_(std=2 * self.d_inp**-0.5)
        self.W_G1.normal_(std=self.d_out**-0.5)
        self.W_G2.normal_()
        self.W_S.normal_(std=self.d_inp**-0.5)
        if self.n_inp != -1:
            self.beta_use.normal_()
            self.beta_ign.normal_()

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as they were drawn at first."""
        self._draw()
        if self.n_inp == -1:
            reset(self.compute_beta_use, self.compute_beta_ign)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_memo": Memo(), **state})  # which a pickle of heinsen_routing's own has not

    def extra_repr(self) -> str:
        names = ("n_inp", "n_out", "d_inp", "d_out", "n_iters", "normalize", "memory_efficient", "return_dict")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def __repr__(self) -> str:
        return f"{self._get_name()}({self.extra_repr()})"

    def _is_plain(self) -> bool:
        """Whether the submodules are what they were made as, and may be read: the op then does what they do."""
        if torch.compiler.is_compiling() or transformed():
            return self._looks_plain()
        modules = list(self._modules.values())
        known = self._memo.known
        if known is None or not known[1].holds(modules):
            if is_traced():  # torch.jit.trace compares two traces, and a memo would shorten the second one
                return self._looks_plain()
            read = [m for m in modules if m is not None]
            known = self._memo.known = self._looks_plain(), Proof(modules, read)
        return known[0]

    def _looks_plain(self, kinds: tuple[type, ...] = ()) -> bool:
        norm: Any = self.N
        if self.d_out > 1 and (type(norm) is not nn.LayerNorm or norm.normalized_shape != (self.d_out,)):
            return False
        if self.d_out > 1 and (norm.weight is not None or norm.bias is not None):
            return False
        if self.d_out > 1 and norm.eps != 1e-5:  # the op's
            return False
        if self.n_inp == -1:
            for beta in (self.compute_beta_use, self.compute_beta_ign):
                if type(beta) is not nn.Linear or not may_be_read(beta, kinds):
                    return False
                weight, bias = beta.weight, beta.bias
                if weight.shape != (self.n_out, self.d_inp) or bias is None or weight.device != self.W_A.device:
                    return False
        kinds = (nn.Sigmoid, nn.LogSigmoid, nn.Softmax) + (() if self.d_out > 1 else (nn.Identity,))
        functions: Any = (self.f, self.log_f, self.softmax, norm)
        return (
            all(type(m) is kind for m, kind in zip(functions, kinds, strict=False))
            and self.softmax.dim == -1
            and all(map(may_be_read, functions))
        )

    def _parameters_by_name(self, x: Tensor | None = None) -> Parameters:
        """The parameters; given x [B, n, d], with the betas that its vectors have, by calls of what makes them."""
        betas: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
        if self.n_inp != -1 and not torch.compiler.is_compiling():
            try:  # fifteen calls of __getattr__ are a sixth of a small layer's time
                own = _OWN(self._parameters)
                return Parameters._make((*own, None, None, self._buffers["CONST_ones_over_n_out"]))
            except KeyError:  # somebody has put another kind of attribute in a parameter's place
                pass
        if self.n_inp != -1:
            betas = (self.beta_use, self.beta_ign, None, None)
        elif x is None:
            use, ign = self.compute_beta_use, self.compute_beta_ign
            betas = (use.weight, ign.weight, use.bias, ign.bias)
        else:
            betas = (self._betas("compute_beta_use", x), self._betas("compute_beta_ign", x), None, None)
        beta_use, beta_ign, bias_use, bias_ign = betas
        return Parameters(
            self.W_A, self.B_A, self.W_F1, self.W_F2, self.B_F2, self.W_G1, self.W_G2, self.B_G2,
            self.W_S, self.B_S, beta_use, beta_ign, bias_use, bias_ign, self.CONST_ones_over_n_out,
        )  # fmt: skip

    def _betas(self, name: str, x: Tensor) -> Tensor:
        """[B, n, m]"""
        made = call(getattr(self, name), x)
        checks.tensor(name, made, "its output to be a tensor [..., n_inp, n_out]")
        if made.shape != (*x.shape[:-1], self.n_out):
            raise ValueError(f"{name}: expected to return {[*x.shape[:-1], self.n_out]}, got {checks.shown(made)}")
        return made

    def _check_input(self, x_inp: Tensor) -> None:
        checks.input_vectors(x_inp, self.n_inp, self.d_inp, self.W_A.device)

    def forward(
        self, x_inp: Tensor, mask: Tensor | None = None, *, lengths: Tensor | Sequence[int] | None = None
    ) -> Tensor | dict[str, Tensor | None]:
        """Route x_inp [..., n_inp, d_inp] to [..., n_out, d_out].

        Args:
            x_inp: floating point, on the parameters' device.
            mask: bool, broadcastable to [..., n_inp, n_out]; True = input i may not reach output j. An input masked
                for every output contributes zero.
            lengths: integers, one per sample (the leading dimensions of x_inp), from 0 to n_inp: vectors from there on
                are padding, never read. Each sample then gives exactly what it gives alone at its own length.

        Returns:
            x_out, or with return_dict the last iteration's a_inp [..., n_inp], V (None, or votes
            [..., n_inp, n_out, d_out] with memory_efficient=False), pred_x_inp [..., n_out, d_inp], S, R, D_use, D_ign,
            phi [..., n_inp, n_out] and x_out. With n_iters=1, pred_x_inp and S are None.
        """
        self._check_input(x_inp)
        *batch, n, d = x_inp.shape
        plain = self._is_plain()
        if plain:
            watching.tell(self, "routed", x_inp, mask, lengths)
        if mask is not None:
            checks.tensor("mask", mask, "a bool tensor")
            checks.together(("x_inp", x_inp), {"mask": mask})
            mask = checks.as_mask(mask, batch, n, self.n_out)
        if lengths is not None:
            lengths = checks.as_lengths(lengths, batch, n, x_inp.device)
        given = x_inp.reshape(-1, n, d)
        if self.return_dict or not plain:
            found = self._last_iteration(reaching(given, mask), given, mask, lengths, plain)
            watching.tell(self, "credit", found["R"], found["phi"])
            if not plain:
                watching.tell(self, "phi", lambda: found["phi"].reshape(*batch, n, -1))
            if not self.return_dict:
                return found["x_out"].reshape(*batch, self.n_out, self.d_out)
            return {k: None if t is None else t.reshape(*batch, *t.shape[1:]) for k, t in found.items()}
        w = self._parameters_by_name()
        x_out = efficient_routing(given, w, n_iters=self.n_iters, normalize=self.normalize, mask=mask, lengths=lengths)
        return x_out.reshape(*batch, self.n_out, self.d_out)

    def stream(
        self,
        chunks: Chunks,
        *,
        n: int | None = None,
        rows: int | None = None,
        mask: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        buffer: bool = False,
    ) -> Tensor:
        """Route input vectors that come in chunks [..., k, d_inp] and need not fit in memory together.

        The result is that of ``forward`` on all of them, up to the order of sums. The chunks are gone through once per
        iteration, and with gradients once more per iteration; between two chunks only [n_out, d] arrays and a number
        per input vector are kept. Parameters have gradients; the vectors have none.

        Args:
            chunks: a tensor, an array or a ``numpy.memmap`` [..., n_inp, d_inp], which is cut here and read a chunk
                ahead (``VectorChunks``); a list or another iterable of chunks, or a function that returns a new
                iterator of them. Tensors of any device, moved to the parameters'; arrays; any number of vectors each,
                none included. Every pass has to give the same ones, which is checked by their sizes and their first
                and last vectors (on a GPU the vectors only under ``fastroute.strict``).
            n: how many vectors there are in all; None: n_inp, or, with ``n_inp=-1``, counted in a pass of its own where
                neither a length nor a list tells.
            rows: vectors of a chunk where one tensor or array is given.
            mask: as in ``forward``, broadcastable to [..., n_inp, n_out].
            lengths: as in ``forward``: vectors of a sample from there on are not used.
            buffer: keep all chunks of an iterator that can be gone through only once; otherwise it is refused where
                more than one pass is needed.

        Returns:
            x_out [..., n_out, d_out], float32 under autocast.

        Raises:
            ValueError, TypeError: naming the argument or the chunk, what was expected and what came: another width,
                dtype or leading dimensions, another number of vectors than n, other vectors than in the first pass.
        """
        if self.return_dict:
            raise ValueError("return_dict: expected False for stream, which has no [n_inp, n_out] arrays to return")
        if not self._is_plain():
            raise ValueError(
                "stream: expected the layer's submodules (compute_beta_use, compute_beta_ign, N, f, log_f, softmax) as "
                "they were made, without hooks and adapters, got others, which only forward can call"
            )
        if self.CONST_ones_over_n_out.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "CONST_ones_over_n_out: expected one that requires no gradient, which stream does not compute; call "
                "the layer itself, or detach it"
            )
        return stream(
            self._parameters_by_name(), chunks, n_inp=self.n_inp, n_iters=self.n_iters, normalize=self.normalize, n=n,
            rows=rows, mask=mask, lengths=lengths, buffer=buffer,
        )  # fmt: skip

    def _votes(self, x: Tensor, w: Parameters, lengths: Tensor | None) -> Tensor | None:
        """V, where it is shown. x and w in one dtype."""
        if self.memory_efficient or not self.return_dict:
            return None
        scaled = x * input_scale(x, lengths).to(x.dtype)[:, None, None]
        scaled = only(scaled, None if lengths is None else row_is_live(x, lengths))
        return (scaled[:, :, None] * w.W_F1) @ w.W_F2 + w.B_F2

    def _last_iteration(
        self, x: Tensor, given: Tensor, mask: Tensor | None, lengths: Tensor | None, plain: bool
    ) -> dict[str, Any]:
        """All iterations but the last on the fused op, the last one written out; unless plain, all are written out.

        What is shown of inputs that reach no output, a_inp, S and V, is of those ``given``, as upstream's; it has no
        gradient.
        """
        kwargs = {"mask": mask, "lengths": lengths}
        autocast = autocast_dtype(x.device.type) is not None
        with autocast_off(x.device.type):
            dtype = torch.promote_types(x.dtype, self.W_F2.dtype)
            if autocast:
                dtype = torch.promote_types(dtype, torch.float32)
            x = x.to(dtype)
            if not plain and lengths is not None:
                x = only(x, row_is_live(x, lengths))
            w = cast(self._parameters_by_name(None if plain else x), dtype)
            check_sizes(w, *x.shape[-2:])
            functions = Functions() if plain else Functions(self.f, self.log_f, self.softmax, self.N)
            before = None
            if plain and self.n_iters > 1:
                before = efficient_routing(x, w, n_iters=self.n_iters - 1, normalize=False, **kwargs)
            last = first_or_next(x, before, w, **kwargs, functions=functions)
            for _ in range(0 if plain else self.n_iters - 1):
                before = last.x_out
                last = first_or_next(x, before, w, **kwargs, functions=functions)
            S, R, D_use, D_ign, phi = last.assignment
            a_inp, V = last.a_inp, self._votes(x, w, lengths)
            if self.return_dict and mask is not None:
                with torch.no_grad():
                    given = given.to(dtype)
                    shown: Any = first_or_next(given, before, w, **kwargs, functions=functions)
                    of_given: Any = self._votes(given, w, lengths)
                kept = reaches(mask)
                a_inp = only(a_inp, kept, shown.a_inp)
                S = None if S is None else only(S, kept, shown.assignment.S)
                V = None if V is None else only(V, kept, of_given)
        return {
            "a_inp": a_inp, "V": V, "pred_x_inp": last.pred_x_inp, "S": S, "R": R, "D_use": D_use, "D_ign": D_ign,
            "phi": phi, "x_out": functions.N(last.x_out) if self.normalize else last.x_out,
        }  # fmt: skip
