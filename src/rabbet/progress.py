"""Progress in words: how far a stage is, and how much longer it takes."""


def duration(seconds: float) -> str:
    """Seconds in a unit that is easily read."""
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 2 else "a second"


def worded(stage: str, done: int, total: int) -> str:
    """What is done of what; a detail of the stage that counts stands in the place of its steps."""
    name, _, detail = stage.partition(": ")
    counts = "" if " of " in detail else f"{done:,} of {total:,}"
    parts = (f"{100 * done // max(total, 1)} %", counts, detail)
    return f"{name}: {', '.join(part for part in parts if part)}"


class Pace:
    """The time of one stage, from its first report; all times are in seconds of one clock."""

    def __init__(self, done: int, total: int, now: float) -> None:
        self.begun, self.first = now, done
        self.done, self.total, self.heard = done, total, now

    def hear(self, done: int, total: int, now: float) -> None:
        """Take another report."""
        if done < self.done:  # the stage has begun anew
            self.begun, self.first = now, done
        self.done, self.total, self.heard = done, total, now

    def words(self, now: float) -> str:
        """How much longer it takes at its pace so far; how long it has taken, if that is unknown.

        A step may take longer than all of the stage was thought to, for steps differ.
        """
        spent = now - self.begun
        if self.done >= self.total:
            return f"{duration(now - self.heard)} ago"
        if self.done > self.first:
            share = (self.done - self.first) / (self.total - self.first)
            left = (self.heard - self.begun) / share - spent
            if left > 0:
                return f"about {duration(left)} left"
        return f"{duration(spent)} so far"
