"""Attention weights that are computed when somebody looks at them, and not before."""

from collections.abc import Callable

from torch import Tensor
from torch.utils import _pytree as pytree


class LazyWeights(Tensor):
    """A tensor of a known shape whose values come from a function, at the first operation on it.

    Layers of "eager" models hand their weights on, and most models drop them; a few put them among their outputs
    unasked. So they must be there, and must cost nothing. Every operation sees an ordinary tensor, with its gradient.
    """

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], compute: Callable[[], Tensor], sources: list[Tensor]):
        like = sources[0]
        return Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)

    def __init__(self, shape: tuple[int, ...], compute: Callable[[], Tensor], sources: list[Tensor]):
        """``compute()`` reads ``sources``, the first of which has the dtype and device of the weights."""
        self._compute, self._value = compute, None
        self._versions = [(source, source._version) for source in sources if not source.is_inference()]

    def _look(self) -> Tensor:
        if self._value is None:
            if any(source._version != version for source, version in self._versions):
                raise RuntimeError(
                    "these attention weights are looked at after the queries or keys that they come from were changed "
                    "in place: ask for them with output_attentions=True"
                )
            self._value, self._compute, self._versions = self._compute(), None, []
        return self._value

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        args, kwargs = pytree.tree_map_only(cls, cls._look, (args, kwargs or {}))
        return func(*args, **kwargs)

    __torch_dispatch__ = __torch_function__
