"""Whether an engine generated what transformers did: the rule by which float32 may differ.

Tokens are equal up to the first one at which the two largest of transformers' logits are less than
`NEAR_TIE` apart: there, rounding may decide, and what follows is another text.
"""

import dataclasses
from collections.abc import Sequence

NEAR_TIE = 1e-3


@dataclasses.dataclass(frozen=True)
class Reference:
    """What transformers generated.

    Attributes:
      tokens: of each request.
      margins: at each token, by how much its logit was above the next one.
    """

    tokens: Sequence[Sequence[int]]
    margins: Sequence[Sequence[float]]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How many requests are as they were, differ from a near tie on, and what is wrong in others.

    Attributes:
      equal: requests with the same tokens.
      near_ties: requests that differ, at a near tie or after one.
      wrong: of each other request, in words, where it differs first.
    """

    equal: int
    near_ties: int
    wrong: tuple[str, ...]


def compare(reference: Reference, found: Sequence[Sequence[int]]) -> Agreement:
    """Returns how the tokens of each request agree with the reference's."""
    if len(found) != len(reference.tokens):
        problem = f"{len(found)} outputs for {len(reference.tokens)} requests"
        return Agreement(0, 0, (problem,))
    equal, near_ties, wrong = 0, 0, []
    pairs = zip(reference.tokens, reference.margins, found, strict=True)
    for request, (expected, margins, tokens) in enumerate(pairs):
        if len(tokens) != len(expected):
            wrong.append(f"request {request}: {len(tokens)} tokens, not {len(expected)}")
            continue
        differing = (i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b)
        first = next(differing, None)
        if first is None:
            equal += 1
        elif min(margins[: first + 1]) < NEAR_TIE:
            near_ties += 1
        else:
            wrong.append(
                f"request {request}: token {first} is {tokens[first]}, not {expected[first]}, "
                f"whose logit is {margins[first]:.2g} above the next one"
            )
    return Agreement(equal, near_ties, tuple(wrong))
