"""The provenance chain: does what an item says it was made from stand among what was given?"""

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import abspath
from typing import Literal

from rdpm_cli.evaluation.report.parts import STAGES, Claim, Item, Stage, short

State = Literal["matches", "broken", "absent"]


@dataclass(frozen=True, kw_only=True)
class Link:
    """A claim and what came of looking for it. says: in words."""

    claim: Claim
    state: State
    says: str


def with_images(items: Sequence[Item]) -> list[Item]:
    """The items in the order the data walks, after an item for every set of images that they name with a digest."""
    found: dict[tuple[str, str], None] = {}
    for item in items:
        for claim in item.claims:
            if claim.stages == ("data",) and claim.digest:
                found[claim.name, claim.digest] = None
    images = [Item(stage="data", name=name, digest=digest) for name, digest in found]
    order = list(STAGES)
    return sorted([*images, *items], key=lambda item: order.index(item.stage))


def links(items: Sequence[Item]) -> list[list[Link]]:
    """For every item, a link for each of its claims.

    broken: what was given of that stage is something else. A claim that nothing given answers to, while all that was
    given of its stage is claimed by others, is only absent.
    """
    return [[_link(claim, item, items) for claim in item.claims] for item in items]


def counts(found: Sequence[Sequence[Link]]) -> dict[State, int]:
    """How many links are of each state."""
    states = [link.state for row in found for link in row]
    return {"matches": states.count("matches"), "broken": states.count("broken"), "absent": states.count("absent")}


def _link(claim: Claim, owner: Item, items: Sequence[Item]) -> Link:
    given = [item for item in items if item.stage in claim.stages and item is not owner]
    if claim.stages == ("data",):
        return _images_link(claim, owner, given, items)
    if not claim.digest:
        return Link(claim=claim, state="absent", says=f"names {claim.name or 'nothing'}, without a digest")
    same = [item for item in given if item.digest == claim.digest]
    if same:
        return Link(claim=claim, state="matches", says=same[0].name)
    others = [item for item in given if item.digest]
    named = [item for item in given if claim.name and abspath(item.name) == abspath(claim.name)]
    if any(not item.digest for item in named):
        return Link(claim=claim, state="absent", says=f"{claim.name}, which was not compared")
    of_pictures = "samples" in claim.stages  # of which there are many, so that others than the named say nothing
    strangers = named or [item for item in others if not (of_pictures or _claimed(item, items))]
    if strangers:
        is_what = ", ".join(f"{item.name} is {short(item.digest)}" for item in strangers[:3])
        return Link(claim=claim, state="broken", says=is_what)
    return Link(
        claim=claim, state="absent", says=f"{claim.name or _stage_name(claim.stages)}, not among what was given"
    )


def _images_link(claim: Claim, owner: Item, given: Sequence[Item], items: Sequence[Item]) -> Link:
    """Images are not given but named: those of one name must have one digest."""
    other = [item for item in given if claim.digest and item.name == claim.name and item.digest != claim.digest]
    if other:
        says = f"{claim.name}, which elsewhere is {short(other[0].digest)}"
        return Link(claim=claim, state="broken", says=says)
    also = [item for item in items if item is not owner and claim in item.claims]
    if claim.digest and also:
        return Link(claim=claim, state="matches", says=claim.name)
    return Link(claim=claim, state="absent", says=f"{claim.name}, named here alone")


def _claimed(item: Item, items: Sequence[Item]) -> bool:
    return any(item.stage in c.stages and c.digest == item.digest for other in items for c in other.claims)


def _stage_name(stages: tuple[Stage, ...]) -> str:
    return " or ".join(STAGES[stage].lower() for stage in stages)
