"""AdamW with moments in 8 bits (Dettmers et al., ICLR 2022), as torchao has it, for this library's training loop."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
import torchao.optim
from torch import Tensor
from torchao.optim.subclass_8bit import OptimState8bit


class AdamW8bit(torchao.optim.AdamW8bit):
    """torchao's, with learning rates that are plain numbers, and ``found_inf`` as torch's fused optimizers have it.

    A step with a non-zero ``found_inf`` changes nothing; reading it waits for the device.
    """

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step, on a CPU without torch.compile, which torchao's uses."""
        if self.found_inf is not None and self.found_inf.item():
            return
        rates = [float(group["lr"]) for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = torch.tensor(rate, dtype=torch.float32, device=group["params"][0].device)
        on_cpu = any(group["params"][0].device.type == "cpu" for group in self.param_groups)
        try:
            with torch.compiler.set_stance("force_eager") if on_cpu else nullcontext(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.compile with fullgraph=True found no compiled frames")
                inspect.unwrap(super().step)(self)  # without the hooks, which belong to this step
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    def fresh(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        moments = {"exp_avg": self._new_buffer(parameter, True), "exp_avg_sq": self._new_buffer(parameter, False)}
        return {"step": torch.tensor(0.0), **moments}

    def restored(self, parameter: Tensor, plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state of a parameter from `plain` tensors of the same shapes."""
        state = self.fresh(parameter)
        for name, value in self.plain(state).items():
            value.copy_(plain[name])
        return state

    @staticmethod
    def plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state of a parameter in plain tensors, which share their memory with it."""
        found = {}
        for name, value in state.items():
            if isinstance(value, OptimState8bit):
                found |= {f"{name}.codes": value.codes, f"{name}.scale": value.scale}
            else:
                found[name] = value
        return found
