"""Which forward argument is the latent, which the timestep; every other tensor is a condition."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from dcc.errors import LoadError

LATENT, TIMESTEP, CONDITION = "latent", "timestep", "condition"
ROLES = (LATENT, TIMESTEP, CONDITION)
NAMES: dict[str, frozenset[str]] = {
    LATENT: frozenset(
        {"x", "hidden_states", "sample", "latent", "latents", "x_t", "xt", "z", "z_t", "noisy_latents", "img"}
    ),
    TIMESTEP: frozenset({"t", "timestep", "timesteps", "time_step", "sigma", "sigmas", "time"}),
}
# Position ids describe the image or the text, not a sample of the batch.
UNBATCHED = frozenset({"img_ids", "txt_ids"})


def infer_roles(arguments: Sequence[str], given: Mapping[str, str] | None = None) -> dict[str, str]:
    """A role for every argument: those given, then by name; exactly one latent and one timestep.

    Raises LoadError where names leave it open.
    """
    given = dict(given or {})
    _check_given(arguments, given)
    roles = dict(given)
    for role in (LATENT, TIMESTEP):
        if role in given.values():
            continue
        found = [name for name in arguments if name not in given and name in NAMES[role]]
        if len(found) != 1:
            raise _open_question(role, arguments, found)
        roles[found[0]] = role
    return {name: roles.get(name, CONDITION) for name in arguments}


def _check_given(arguments: Sequence[str], given: Mapping[str, str]) -> None:
    unknown = [name for name in given if name not in arguments]
    if unknown:
        raise LoadError(
            f"a role is given for '{unknown[0]}', which is not an argument", got=_listed(arguments),
            next="name one of them",
        )  # fmt: skip
    for name, role in given.items():
        if role not in ROLES:
            raise LoadError(
                f"unknown role '{role}' for '{name}'", want=_listed(ROLES), next=f"--role {name}=condition"
            )
    for role in (LATENT, TIMESTEP):
        named = [name for name, value in given.items() if value == role]
        if len(named) > 1:
            raise LoadError(f"{len(named)} arguments are given as the {role}", got=_listed(named), want="one")


def _open_question(role: str, arguments: Sequence[str], found: Sequence[str]) -> LoadError:
    example = (found or arguments or ["NAME"])[0]
    return LoadError(
        f"cannot tell which argument is the {role}",
        got=f"arguments {_listed(arguments)}" + (f"; {_listed(found)} could all be it" if found else ""),
        want=f"one of them named as the {role}",
        next=f"--role {example}={role} (Python: roles={{{example!r}: {role!r}}})",
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
