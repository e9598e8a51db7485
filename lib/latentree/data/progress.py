"""How long work tells how far it is."""

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 10  # between lines where there is neither a terminal nor a notebook


class Reporter:
    """A bar in a terminal or a notebook, elsewhere a line every LINE_SECONDS on standard error; nothing if not `show`."""

    def __init__(self, name: str, total: int, done: int, unit: str, show: bool = True):
        self.name, self.total, self.first, self.unit, self.show = name, total, done, unit, show
        self.started = self.told = time.monotonic()
        bar = show and (sys.stderr.isatty() or "ipykernel" in sys.modules)
        large = total > 10_000
        self.bar = tqdm(
            desc=name,
            total=total,
            initial=done,
            unit=f" {unit}",
            unit_scale=large,
            mininterval=0.5,
            disable=not bar,
        )

    def __call__(self, done: int, note: str = "") -> None:
        """Tell that `done` of the total are done, and something of the latest."""
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(done - self.bar.n)
        now = time.monotonic()
        if (
            self.show
            and self.bar.disable
            and (now - self.told > LINE_SECONDS or done == self.total)
        ):
            self.told = now
            speed = (done - self.first) / max(now - self.started, 1e-9)
            left = (self.total - done) / max(speed, 1e-9)
            line = f"{done:,} of {self.total:,} {self.unit}, {note}, {speed:,.3g} a second, {left:.0f} s left"
            print(f"{self.name}: {line}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """The end of the bar."""
        self.bar.close()
