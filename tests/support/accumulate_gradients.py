"""What a random program may do to gradients: make them, look at them, keep them, write, clip and remove them."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from support.accumulate_model import Fail


@contextlib.contextmanager
def _default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS = {"inference": torch.inference_mode, "meta": lambda: torch.device("meta"), "double": _default_dtype}
HOLDS = {
    "grad": lambda grad: grad,
    "view": lambda grad: grad.view(-1)[1:],
    "detached": torch.Tensor.detach,
    "data": lambda grad: grad.data,
    "numpy": lambda grad: torch.from_numpy(grad.detach().numpy()),
}


class GradientOperations:
    """For ``Machine``, which has the model and keeps the books."""

    # ---- backward passes

    def backward(self, seed, heads=("a",), middle=1, reentrant=None, times=1, graph=False, how="plain", of=None):
        """``how``: plain, in a thread, failing, of the scaled loss, of infinity, or for some inputs (``of``) only."""
        dtype = self.model.trunk.weight.dtype
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(4, 20, generator=generator).to(dtype).requires_grad_()
        loss = self.model(Fail.apply(x) if how == "fail" else x, heads, middle, reentrant)
        if how == "fail" and reentrant is None:
            loss = loss + Fail.apply(self.model.trunk.bias * 1).sum() * 0
        if how == "infinite":
            loss = loss * torch.inf
        if how == "scaled":
            loss = self.scaler.scale(loss)
        options = {"create_graph": graph}
        if how == "inputs":
            options["inputs"] = [self._parameter(name) for name in of if self._parameter(name).requires_grad]
            if not options["inputs"]:
                return

        def run():
            for i in range(times):
                loss.backward(retain_graph=graph or i + 1 < times, **options)

        with self._changing("add"), SURROUNDINGS.get(how, contextlib.nullcontext)():
            if how == "thread":
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(run).result()
            else:
                run()
        self._note(loss.detach())

    def penalty(self, seed, head="a"):
        """The gradient of the norm of a gradient that a first pass left in ``.grad``."""
        loss = self.model(torch.randn(4, 20, generator=torch.Generator().manual_seed(seed)), (head,))
        loss.backward(create_graph=True)
        norms = [p.grad.square().sum() for p in self.model.parameters() if p.grad is not None and p.grad.requires_grad]
        if norms:
            (0.1 * sum(norms)).backward()

    def regularise(self, name, how):
        """Gradients that are expanded or transposed views, as torch makes them."""
        parameter = self._parameter(name)
        if parameter.requires_grad:
            ones = torch.ones(parameter.shape[::-1], dtype=parameter.dtype)
            loss = parameter.sum() if how == "expanded" else (parameter.t() * ones).sum()
            with self._changing("add"):
                (0.01 * loss).backward()

    def differentiate(self, seed):
        """A gradient that doesn't go to ``.grad``."""
        weight = self.model.trunk.weight
        if weight.requires_grad:
            x = torch.randn(4, 20, generator=torch.Generator().manual_seed(seed)).to(weight.dtype)
            self._note(torch.autograd.grad(self.model(x, ("b",)), weight)[0])

    # ---- gradients

    def look(self, where="plain"):
        """``where``: in which of torch's modes; what is seen must still be an ordinary gradient afterwards."""
        with SURROUNDINGS.get(where, contextlib.nullcontext)():
            grads = [p.grad for p in self.model.parameters()]
        self._note([None if grad is None else grad.detach().clone() for grad in grads])

    def hold(self, name, how="grad"):
        """Keeps a reference to a gradient or to its memory; what it holds is compared from now on."""
        grad = self._parameter(name).grad
        if grad is not None:
            self.held.append((name, HOLDS[how](grad)))

    def compare_held(self):
        self._note([self._parameter(name).grad is grad for name, grad in self.held])

    def let_go(self):
        self.held.clear()

    def write(self, name, how, seed=0):
        parameter = self._parameter(name)
        values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)).to(parameter.dtype) * 0.1
        kinds = {"mul": "shrink", "data_mul": "shrink", "numpy": "shrink", "clamp": "keep", "numpy_clamp": "keep"}
        with self._changing(kinds.get(how, "replace")), torch.no_grad():
            if how in ("assign", "none", "delete"):
                if how == "delete":
                    del parameter.grad
                else:
                    parameter.grad = values if how == "assign" else None
            elif parameter.grad is None:
                self._note("nothing to write to")
            elif how == "mul":
                parameter.grad.mul_(0.5)
            elif how == "data_mul":
                parameter.grad.data.mul_(-0.5)
            elif how == "numpy":
                array = parameter.grad.detach().numpy()
                array *= 0.25
            elif how == "numpy_clamp":
                array = parameter.grad.detach().numpy()
                array.clip(-0.01, 0.01, out=array)
            elif how == "clamp":
                parameter.grad.clamp_(-0.01, 0.01)
            elif how == "zero":
                parameter.grad.zero_()
            elif how == "copy":
                parameter.grad.copy_(values)
            elif how == "data":
                parameter.grad.data = values
            elif how == "item":
                parameter.grad[0] = 0.5
            elif how == "share":  # one tensor for two parameters
                self.model.a.weight.grad = self.model.b.weight.grad

    def clip(self, how, limit=0.05):
        with self._changing("clip" if how in ("norm", "imported norm", "norm of some") else "keep"):
            if how == "imported norm":
                self._note(clip_grad_norm_(self.model.parameters(), limit))
            elif how == "norm":
                self._note(nn.utils.clip_grad_norm_(self.model.parameters(), limit, foreach=False))
            elif how == "norm of some":
                self._note(nn.utils.clip_grad_norm_(self.model.trunk.parameters(), limit))
            elif how == "value":
                nn.utils.clip_grad_value_(self.model.parameters(), limit / 10)
            else:
                grads = [p.grad for p in self.model.parameters() if p.grad is not None]
                total = nn.utils.get_total_norm(grads)
                self._note(total)
                if how == "total norm, then scale" and grads:
                    with self._changing("clip"):
                        nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, total)

    def zero_grad(self, whose="optimizer", set_to_none=True):
        who = {"optimizer": self.optimizer, "model": self.model, "layer": self.model.trunk}[whose]
        with self._changing("replace"):
            who.zero_grad(set_to_none=set_to_none)
