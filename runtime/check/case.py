"""A case: one call of an operation with its inputs, and how what it makes of them is compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from runtime.check.comparison import SAME_ROUNDINGS, assert_as_exact, assert_same_roundings, require
from runtime.check.guard import Guarded
from runtime.kernels.launch import INTERPRETING
from runtime.kernels.ops import Ops, TorchOps, ops_for

# Where cases run that are not told otherwise.
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu"
EPS = 1e-6
Results = dict[str, torch.Tensor]

# Arguments whose first dimension is the rows of a batch; `emitted` has them in its second.
ROW_TENSORS = {
    *("x", "branch", "residual", "normed", "qkv", "position", "k_cache", "v_cache"),
    *("token", "done", "stop_ids", "limit", "seed", "inverse_temperature", "mask"),
}
# Slots that no visible position has filled hold this, which shows in any sum.
UNFILLED = 1e4


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def unwritten(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """An output in which every element that a kernel leaves out shows."""
    return torch.full(shape, float("nan"), dtype=dtype)


@dataclass
class Case:
    """One call of an operation, to be run on any backend, by plain PyTorch in fp64 too.

    Attributes:
        call: takes a backend, then the arguments by name.
        inputs: by name, on the CPU. Those that the operation writes to are results too.
        outputs: the shapes of its other results, by name, without the rows.
        rows: of the batch.
        dtype: the model's.
        written: the inputs that the operation writes to.
        exact: the results that have to be the reference's bit for bit.
        looser: another bound than SAME_ROUNDINGS for results whose roundings are not all Hugging Face's, by design.
        gpu_slack: what of its largest value a result may be off on a GPU for the sake of the hardware's functions.
        device: where it runs.
    """

    call: Callable[..., None]
    inputs: dict[str, Any]
    outputs: Mapping[str, tuple[int, ...]]
    rows: int
    dtype: torch.dtype
    written: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()
    looser: dict[str, float] = field(default_factory=dict)
    gpu_slack: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    device: str = DEVICE

    @property
    def kernel(self) -> Callable[..., None]:
        """The call on Triton kernels, of a model whose most rows are not known."""
        return self.kernel_of(None)

    def kernel_of(self, max_rows: int | None) -> Callable[..., None]:
        """The call on the Triton kernels of a model of at most so many rows; of one, each row is a call of its own."""
        ops = ops_for(torch.device(self.device), max_rows)
        return self.row_by_row(ops) if max_rows == 1 else self.on(ops)

    def on(self, ops: Ops) -> Callable[..., None]:
        """The call on a backend."""
        return partial(self.call, ops)

    def row_by_row(self, ops: Ops) -> Callable[..., None]:
        """The call on a backend, once for each row."""

        def call(**arguments: Any) -> None:
            of_rows = ROW_TENSORS | self.outputs.keys()
            for row in range(len(arguments[next(iter(self.outputs))])):
                own = {
                    name: value[row : row + 1] if name in of_rows and value is not None else value
                    for name, value in arguments.items()
                }
                self.call(ops, **own)

        return call

    @property
    def reference(self) -> Callable[..., None]:
        """The call in plain PyTorch."""
        return self.on(TorchOps())

    def run(
        self,
        function: Callable[..., None],
        rows: slice = slice(None),
        dtype: torch.dtype | None = None,
        device: str | None = None,
        **changed: Any,
    ) -> Results:
        """What a function makes of some rows, its floating-point inputs cast to `dtype` if that is given.

        Raises:
            Mismatch: it has written beside an argument.
        """
        where = torch.device(device or self.device)
        count = len(range(self.rows)[rows])

        def prepared(name: str, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            value = value[:, rows] if name == "emitted" else value[rows] if name in ROW_TENSORS else value
            cast = dtype if dtype and value.is_floating_point() else value.dtype
            return value.to(where, cast)

        arguments = {name: prepared(name, value) for name, value in self.inputs.items()}
        for name, shape in self.outputs.items():
            arguments[name] = unwritten(count, *shape, dtype=dtype or self.dtype).to(where)
        guarded = {name: Guarded(value) for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        arguments |= {name: guard.tensor for name, guard in guarded.items()}
        if where.type == "cuda":
            torch.cuda.synchronize(where)  # decode_attention reads its cache before it waits for the kernel before it
        function(**arguments, **self.options | changed)
        for name, guard in guarded.items():
            guard.assert_intact(name)
        return {name: arguments[name] for name in (*self.outputs, *self.written)}

    def assert_right(self, given: Results) -> float:
        """Compares results with the reference's: as exact, and bit for bit where they can be.

        Returns:
            The largest error as a share of what it may be.
        """
        plain, truth = self.run(self.reference), self.run(self.reference, dtype=torch.float64)
        slack = self.gpu_slack if torch.device(self.device).type == "cuda" else 0.0
        shares = [0.0]
        for name in given:
            if name in self.exact:
                require(torch.equal(given[name], plain[name]), f"{name} differs from the reference's")
            else:
                shares.append(assert_as_exact(given[name], plain[name], truth[name], slack, self.magnitude(), name))
        return max(shares)

    def magnitude(self) -> float:
        """The largest sum of what is added up, without signs, where the plain operation adds it in a higher precision
        than the kernel; 0 where it does not, and so has the error of its own sums."""
        return 0.0

    def assert_rounded(self, given: Results) -> None:
        """Compares where results were rounded. Takes a dtype of 16 bits, and enough values for a share of them.

        The plain operation is a CPU's, whose products are rounded once; a GPU's may add up parts in 16 bits.
        """
        plain = self.run(self.reference, device="cpu")
        truth = self.run(self.reference, device="cpu", dtype=torch.float64)
        for name in given.keys() - {*self.exact}:
            bound = self.looser.get(name, SAME_ROUNDINGS)
            assert_same_roundings(given[name].cpu(), plain[name], truth[name], bound, name)

    def compare(self, given: Results) -> float:
        """Every comparison that the dtype allows. Returns what assert_right does."""
        share = self.assert_right(given)
        if self.dtype.itemsize == 2:
            self.assert_rounded(given)
        return share
