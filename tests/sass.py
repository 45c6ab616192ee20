"""Count machine instructions of a compiled kernel: the shortest turn of its main loop.

A pass over a block of logits has one loop in which nearly all of its time goes, the one of the most elements; the others are
of strips at the edge. What one turn of it costs is the shortest way through its branches, from its
head back to its head.
"""

from __future__ import annotations

import re

_LINE = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+((?:@!?U?P\w+\s+)?[A-Z][^;]*);", re.MULTILINE)


def main_loop(sass: str, through: str = "") -> tuple[str, ...]:
    """Return the instructions of the shortest turn of the loop with the most exponentials, of equal ones the most stores.

    Args:
        sass: of one kernel, from cuobjdump.
        through: the turn goes through an instruction that begins so; without one in the loop there is no such turn.
    """
    code = [(int(place, 16), text) for place, text in _LINE.findall(sass)]
    index = {place: i for i, (place, _) in enumerate(code)}
    texts = [text for _, text in code]
    targets = {i: index[t] for i, text in enumerate(texts) if (t := _target(text)) in index}
    loops = [(head, last) for last, head in targets.items() if head < last]
    assert loops, "no loop found: has the disassembler changed its format?"

    def elements(loop: tuple[int, int]) -> tuple[int, int]:
        body = "\n".join(texts[loop[0] : loop[1] + 1])
        # At the edge a gradient takes two exponentials, but stores are one an element.
        return body.count("MUFU.EX2"), len(re.findall(r"STG\..*128", body))

    head, last = max(loops, key=elements)
    between = next((i for i in range(head, last) if texts[i].startswith(through)), None)
    if between is None:
        return ()
    way = _shortest_way(texts, targets, head, between)
    way += _shortest_way(texts, targets, between, last)[1:]
    return tuple(texts[i] for i in way)


def _shortest_way(texts: list[str], targets: dict[int, int], head: int, last: int) -> list[int]:
    """Return the fewest instructions from one to a later one: a search in breadth."""
    if head == last:
        return [head]
    came_from: dict[int, int] = {}
    frontier = [head]
    while last not in came_from and last not in frontier:
        following = []
        for at in frontier:
            steps = {targets[at]} if at in targets else set()
            is_jump = at in targets and not texts[at].startswith("@")
            if not is_jump:
                steps.add(at + 1)
            for step in steps:
                if head < step <= last and step not in came_from:
                    came_from[step] = at
                    following.append(step)
        assert following, "a loop's end cannot be reached from its head"
        frontier = following

    way = [last]
    while way[-1] != head:
        way.append(came_from[way[-1]])
    return way[::-1]


def _target(text: str) -> int | None:
    """Return the place that a branch goes to; None of another instruction."""
    found = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)
    return int(found.group(1), 16) if found else None
