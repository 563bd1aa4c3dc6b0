"""Reader of jaxprs: the work that a function does on its parameters alone."""

from collections.abc import Callable

import jax
from jax.extend.core import Literal

# Operations that a compiler folds into whatever reads their result.
VIEWS = {"broadcast_in_dim", "reshape", "squeeze", "convert_element_type", "pjit", "jit"}


def constant_work(function: Callable, params, *inputs) -> list[str]:
    """The operations of ``function(params, *inputs)``, views aside, that read nothing but parameters."""
    closed = jax.make_jaxpr(function)(params, *inputs)
    fixed = set(closed.jaxpr.invars[: len(jax.tree.leaves(params))])
    return _walk(closed.jaxpr, fixed)


def _walk(jaxpr, fixed: set) -> list[str]:
    found = []
    for equation in jaxpr.eqns:
        reads = [var for var in equation.invars if not isinstance(var, Literal)]
        name = equation.primitive.name
        inner = equation.params.get("jaxpr")
        if inner is not None:
            inner = getattr(inner, "jaxpr", inner)
            pairs = zip(inner.invars, equation.invars, strict=False)
            known = {a for a, b in pairs if not isinstance(b, Literal) and b in fixed}
            found += _walk(inner, known) if name in VIEWS else []
        if reads and all(var in fixed for var in reads):
            fixed |= set(equation.outvars)
            if name not in VIEWS and equation.outvars[0].aval.size > 1:
                found.append(name)
    return found
