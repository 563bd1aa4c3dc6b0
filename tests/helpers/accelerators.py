"""GPUs and TPUs on a CPU: their branches of `platform_dependent`, and what they round in matrix products.

Unless the precision of a product is 'highest', its float32 operands keep 10 bits of mantissa on GPUs that have
TF32, and 7 on TPUs.
"""

from collections.abc import Callable, Iterator

import jax
from jax.extend import core

TF32, BFLOAT16 = 10, 7
PRODUCTS = ("dot_general", "conv_general_dilated")


def rounded_products(function: Callable, *args) -> list[str]:
    """The products of two float32 operands, at any depth of a function's program, that may be rounded.

    In the gradient of a bfloat16 product one operand may be float32; it is rounded to the other's dtype.
    """
    closed = jax.make_jaxpr(function)(*args)
    found = [eqn for eqn in _equations(closed.jaxpr) if _is_rounded(eqn)]
    return [str(eqn) for eqn in found if all(v.aval.dtype == "float32" for v in eqn.invars)]


def on_accelerator(function: Callable, bits: int) -> Callable:
    """The function as an accelerator runs it, rounding operands to ``bits`` bits of mantissa where it may."""

    def run(*args):
        flat, tree = jax.tree.flatten(args)
        closed, out = jax.make_jaxpr(
            lambda *flat: function(*jax.tree.unflatten(tree, flat)), return_shape=True
        )(*flat)
        values = _run(closed.jaxpr, closed.consts, flat, bits)
        return jax.tree.unflatten(jax.tree.structure(out), values)

    return jax.jit(run)


def _inner(eqn) -> Iterator:
    for value in eqn.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, core.ClosedJaxpr):
                yield each.jaxpr, each.consts
            elif isinstance(each, core.Jaxpr):
                yield each, ()


def _equations(jaxpr) -> Iterator:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner, _ in _inner(eqn):
            yield from _equations(inner)


def _is_rounded(eqn) -> bool:
    highest = jax.lax.Precision.HIGHEST
    return eqn.primitive.name in PRODUCTS and eqn.params["precision"] not in (
        highest,
        (highest, highest),
    )


def _run(jaxpr, consts, args, bits: int) -> list:
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    for eqn in jaxpr.eqns:
        given = [v.val if isinstance(v, core.Literal) else values[v] for v in eqn.invars]
        found = _equation(eqn, given, bits)
        values |= zip(eqn.outvars, found, strict=True)
    return [v.val if isinstance(v, core.Literal) else values[v] for v in jaxpr.outvars]


def _equation(eqn, given: list, bits: int) -> list:
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return _scan(params, given, bits)
    if name == "cond":
        return _cond(params, given, bits)
    if name == "while":
        raise NotImplementedError("a while loop")
    inner = list(_inner(eqn))
    if inner and name != "reduce":
        # A call: of jit, of remat, or of a function with a derivative of its own, which comes first.
        return _run(*inner[0], given, bits)
    if _is_rounded(eqn):
        given = [_rounded(a, bits) if a.dtype == "float32" else a for a in given]
    found = eqn.primitive.bind(*given, **params)
    return found if eqn.primitive.multiple_results else [found]


def _rounded(a, bits: int):
    return jax.lax.reduce_precision(a, exponent_bits=8, mantissa_bits=bits)


def _scan(params, given: list, bits: int) -> list:
    body, fixed, carried = params["jaxpr"], params["num_consts"], params["num_carry"]

    def step(carry, row):
        out = _run(body.jaxpr, body.consts, [*given[:fixed], *carry, *row], bits)
        return out[:carried], out[carried:]

    start, rows = given[fixed : fixed + carried], given[fixed + carried :]
    how = dict(length=params["length"], reverse=params["reverse"])
    carry, found = jax.lax.scan(step, start, rows, **how)
    return [*carry, *found]


def _cond(params, given: list, bits: int) -> list:
    branches = [
        lambda *args, branch=branch: _run(branch.jaxpr, branch.consts, args, bits)
        for branch in params["branches"]
    ]
    index, *args = given
    if params.get("branches_platforms") is not None:
        # Of `platform_dependent`: the branch for the platforms that it does not name.
        return branches[params["branches_platforms"].index(None)](*args)
    return jax.lax.switch(index, branches, *args)
