"""Random programs that train with and without a session of ``torch_sluice.accumulate``, and must not tell them apart.

By hand: ``PYTHONPATH=tests python -m support.accumulate_programs --count 10000 [--seed 5] [--policy fp16]``. A program
is a list of operations of ``Machine``, a function of its seed; one that fails is printed without what it fails without.
"""

import argparse
import contextlib
import random
import warnings

import torch

import torch_sluice
from support.accumulate_gradients import HOLDS, SURROUNDINGS
from support.accumulate_machine import Machine
from support.accumulate_model import LAYERS, OPTIMIZERS

TOLERANCES = {"fp32": 0.0, "fp16": 2e-3, "auto": 2e-3}  # of a sum, relative to the norms of what was added
WRITES = (
    "mul",
    "data_mul",
    "numpy",
    "numpy_clamp",
    "clamp",
    "zero",
    "copy",
    "data",
    "item",
    "assign",
    "none",
    "delete",
)
CLIPS = ("norm", "imported norm", "norm of some", "value", "total norm", "total norm, then scale")
PARAMETERS = [f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")]
POLICIES = tuple(TOLERANCES)
FLOOR = 1e-18  # below this the norm of a gradient underflows


class Differs(AssertionError):
    """The two sides of a program have parted."""


def open_session(policy, every=None, tokens=None):
    """``tokens``: the reduction, where micro-batches are weighed by their tokens."""
    options = {"policy": policy, "reduction": tokens or "mean"}
    return lambda model, optimizer: torch_sluice.accumulate(model, optimizer, every, **options)


# ---- making one


def draw_operation(draw, lossy):
    """An operation's name and arguments."""
    name = draw.choices(
        ["backward", "step", "zero_grad", "look", "write", "hold", "let_go", "clip", "freeze", "hook", "remove_hooks",
         "step_with_closure", "scaled", "leave", "save", "load", "restart", "reset", "cast", "copy_model", "penalty",
         "add_group", "shrink_weights", "differentiate", "regularise",
         "other_step", "other_zero_grad"],
        [30, 12, 9, 8, 10, 4, 2, 5, 4, 3, 2, 2, 2, 3, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2],
    )[0]  # fmt: skip
    seed = draw.randrange(10**6)
    if name == "backward":
        how = draw.choices(
            ["plain", "thread", "fail", "inputs", "infinite", *SURROUNDINGS], [20, 1, 1, 1, 0.5, 0, 1, 1]
        )[0]
        options = {"heads": tuple(draw.sample(("a", "b", "late"), draw.choice((1, 1, 2, 3)))), "how": how}
        options["middle"] = draw.choice((0, 1, 1, 2))
        if how == "inputs":
            options["of"] = tuple(draw.sample(PARAMETERS, 3))
        elif draw.random() < 0.2:
            options["reentrant"] = draw.choice((True, False))
        elif draw.random() < 0.15:
            options["times"] = 2
        elif draw.random() < 0.07:
            options["graph"] = True
        if lossy and how == "infinite":
            options["how"] = "plain"
        return name, {"seed": seed, **options}
    if name == "scaled":
        return "backward", {"seed": seed, "how": "scaled"}
    if name == "penalty" and lossy:
        return "look", {}
    if name in ("penalty", "differentiate", "copy_model"):
        return name, {"seed": seed}
    if name == "other_zero_grad":
        return name, {"set_to_none": draw.random() < 0.7}
    if name == "step_with_closure":
        return name, {"seed": seed, "clipped": draw.random() < 0.5}
    if name == "step" and draw.random() < 0.15:
        return draw.choice(("unscale", "scaler_step")), {}
    if name == "zero_grad":
        whose = draw.choice(("optimizer", "optimizer", "optimizer", "model", "layer"))
        return name, {"whose": whose, "set_to_none": draw.random() < 0.7}
    if name == "write":
        return name, {"name": draw.choice(PARAMETERS), "how": draw.choice(WRITES), "seed": seed}
    if name == "look":
        return name, {"where": draw.choice(("plain", "plain", *SURROUNDINGS))}
    if name == "regularise":
        return name, {"name": draw.choice(PARAMETERS[::2]), "how": draw.choice(("expanded", "transposed"))}
    if name == "hold":
        return name, {"name": draw.choice(PARAMETERS), "how": draw.choice(("grad", "grad", *HOLDS))}
    if name == "clip":
        return name, {"how": draw.choice(CLIPS)}
    if name == "freeze":
        return name, {"layer": draw.choice(LAYERS), "frozen": draw.random() < 0.5}
    if name == "hook":
        how = draw.choice(("tensor", "read", "halve", "drop", "keep", "keep what comes", "fail", "before step"))
        return name, {"name": draw.choice(PARAMETERS), "how": how}
    if name == "leave":
        return name, {"again": draw.random() < 0.5, "error": draw.random() < 0.3}
    if name == "cast":
        return name, {"double": draw.random() < 0.5}
    return name, {}


def make_program(seed, policy):
    """The make of ``Machine``, its settings, and operations. A float16 sum can be judged under plain SGD only."""
    draw, lossy = random.Random(seed), policy != "fp32"
    settings = {"optimizer": "sgd" if lossy else draw.choice(tuple(OPTIMIZERS)), "tolerance": TOLERANCES[policy]}
    settings["two"] = draw.random() < 0.3
    length, looks = draw.randint(3, 40), draw.choice((0.0, 0.0, 0.1, 0.5))
    operations = []
    for _ in range(length):
        operations.append(draw_operation(draw, lossy))
        if draw.random() < looks:
            operations.append(("look", {}))
    return Machine, settings, operations


# ---- running one


def _compare(what, found, wanted, allowed=0.0):
    if isinstance(wanted, (list, tuple)):
        if len(found) != len(wanted):
            raise Differs(f"{what}: {len(found)} values, expected {len(wanted)}")
        for i, pair in enumerate(zip(found, wanted, strict=True)):
            _compare(f"{what}[{i}]", *pair, allowed[i] if isinstance(allowed, list) else allowed)
    elif isinstance(wanted, torch.Tensor) and isinstance(found, torch.Tensor):
        if found.dtype != wanted.dtype or found.shape != wanted.shape:
            raise Differs(f"{what}: {found.dtype} {list(found.shape)}, expected {wanted.dtype} {list(wanted.shape)}")
        if torch.equal(found.nan_to_num(7.5), wanted.nan_to_num(7.5)):
            return
        error = (found.detach().double() - wanted.detach().double()).norm().item()
        if not error <= allowed:
            raise Differs(f"{what}: wrong by {error:.3g}, expected at most {allowed:.3g} of {wanted.norm().item():.3g}")
    elif type(found) is not type(wanted) or (found != wanted and not abs(found - wanted) <= allowed):
        raise Differs(f"{what}: {str(found)[:60]}, expected {str(wanted)[:60]}")


def _compare_sides(ours, plain):
    lossy = plain.tolerance > 0
    for (found, _, _), (wanted, each, everything) in zip(ours.observed, plain.observed, strict=True):
        everything = max(everything, plain.tolerance * plain.peak)
        by_parameter = isinstance(wanted, list) and len(wanted) == len(each)
        _compare(
            "what was seen",
            found,
            wanted,
            [one + FLOOR * lossy for one in each] if by_parameter else everything + 1e-5 * lossy,
        )
    ours.observed.clear()
    plain.observed.clear()
    for i, (name, held) in enumerate(plain.held):
        _compare(f"{name}.grad that was kept", ours.held[i][1], held, plain.tolerance * plain.highest)
    for name, wanted in plain.model.named_parameters():
        found, norm = ours.model.get_parameter(name), wanted.norm().item()
        _compare(name, found.detach(), wanted.detach(), 0.1 * plain.tolerance * plain.peak + 1e-6 * lossy * norm)
        if lossy:  # errors don't add up over steps
            found.data.copy_(wanted.data)
            for key, value in plain.optimizer.state.get(wanted, {}).items():
                if isinstance(value, torch.Tensor):
                    ours.optimizer.state[found][key].copy_(value)
    plain.peak = sum(plain.scale.values())
    if ours.session is not None and ours.kind != "fused" and hasattr(ours.session, "steps"):
        _compare("session.steps", ours.session.steps, plain.steps)
        _compare("session.skipped_steps", ours.session.skipped_steps, plain.skipped)


def _do(machine, name, arguments):
    try:
        getattr(machine, name)(**arguments)
    except Exception as error:
        return type(error).__name__, str(error)
    return None, ""


def run_program(kind, settings, operations, make_session):
    """Runs both sides; ``Differs`` tells after which operation they part."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, ours = kind(**settings), kind(**settings, open_session=make_session)
        try:
            for i, (name, arguments) in enumerate([*operations, ("look", {}), ("_close", {})]):
                (wanted, _), (found, text) = _do(plain, name, arguments), _do(ours, name, arguments)
                try:
                    if found != wanted:
                        raise Differs(f"raises {found} {text}, expected {wanted}")
                    plain.compare_held()
                    ours.compare_held()
                    _compare_sides(ours, plain)
                except ValueError as error:
                    raise Differs(f"operation {i}: different numbers of values were seen: {error}") from error
                except Differs as error:
                    raise Differs(f"operation {i}, {show(name, arguments)}: {error}") from None
        except Differs:
            with contextlib.suppress(Exception):
                ours._close()
            raise


# ---- telling of one


def show(name, arguments):
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def failure_of(kind, settings, operations, make_session):
    try:
        run_program(kind, settings, operations, make_session)
    except Differs as error:
        return str(error)
    return None


def shrink(kind, settings, operations, make_session):
    """The operations without those that the failure doesn't need, taken out in halves, quarters, ... one by one."""
    size = max(len(operations) // 2, 1)
    while True:
        i, before = 0, len(operations)
        while i < len(operations):
            shorter = operations[:i] + operations[i + size :]
            if failure_of(kind, settings, shorter, make_session):
                operations = shorter
            else:
                i += size
        if size == 1 and len(operations) == before:
            return operations
        size = max(size // 2, 1)


def check_program(seed, policy, make_session=None, make=make_program):
    """None, or a text: the seed, what went wrong, and the shortest program that was found to go wrong."""
    kind, settings, operations = make(seed, policy)
    make_session = make_session or open_session(policy, settings.get("every"), settings.get("tokens"))
    if failure_of(kind, settings, operations, make_session) is None:
        return None
    operations = shrink(kind, settings, operations, make_session)
    lines = [f"program {seed}, policy {policy}, {settings}", *(f"    {show(*one)}" for one in operations)]
    return "\n".join([*lines, f"  {failure_of(kind, settings, operations, make_session)}"])


def main(make=make_program):
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**9))
    parser.add_argument("--policy", choices=POLICIES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    failures = 0
    for seed in range(options.seed, options.seed + options.count):
        text = check_program(seed, options.policy or POLICIES[seed % len(POLICIES)], make=make)
        if text:
            failures += 1
            print(text, flush=True)
    print(f"{options.count} programs from seed {options.seed}: {failures} failed")
    raise SystemExit(failures > 0)


if __name__ == "__main__":
    main()
