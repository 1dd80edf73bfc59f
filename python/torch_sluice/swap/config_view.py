"""A transformers config seen by one attention layer: the model's own, but for the name of the implementation."""

import functools

_PROPERTY = "_attn_implementation"


class _NotAConfigClassOfItsOwn:
    """First base of a view's class: transformers would register what its configs' subclasses declare."""

    def __init_subclass__(cls, **options):
        pass


@functools.cache
def _view_class(cls: type) -> type:
    names = {
        "__slots__": ("sluice_config", "sluice_name"),
        "__reduce__": lambda self: (view_config, (self.sluice_config, self.sluice_name)),
        "__reduce_ex__": lambda self, protocol: self.__reduce__(),
        "__module__": __name__,
        _PROPERTY: property(lambda self: self.sluice_name),
    }
    return type(cls.__name__, (_NotAConfigClassOfItsOwn, cls), names)


def view_config(config, name: str):
    """A config that shares every attribute with ``config`` but answers ``_attn_implementation`` with ``name``.

    So a layer asks for another attention function, while the model goes on to make the masks that it always made, and
    layers beside it don't notice. Attributes that are set on either are seen in both. Copies and pickles.
    """
    view = object.__new__(_view_class(type(config)))
    object.__setattr__(view, "__dict__", config.__dict__)
    object.__setattr__(view, "sluice_config", config)
    object.__setattr__(view, "sluice_name", name)
    return view
