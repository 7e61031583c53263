"""Who decodes, who reads and who waits: places, memory for keys and values, and what to read next.

A place is a share of the step, memory a share of the budget of positions. Both go to the owner who was served least;
when memory runs out, or an owner without any place waits, the owner with most gives up its youngest sample, which is
read again later and then goes on as if nothing had happened. This module runs no base and draws no tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from treadle_engine.decode_requests import Prompt, Reading, Sample
from treadle_engine.kv_cache import KvCache, capacity_for
from treadle_engine.prefix_cache import BLOCK
from treadle_engine.prompt_scores import prepare
from treadle_engine.waiting_line import WaitingLine


class Places:
    """The places of one decoder."""

    def __init__(self, cache: KvCache, max_places: int, *, keep_prefixes: bool) -> None:
        """Start with all places free."""
        self.line: WaitingLine[Prompt] = WaitingLine()
        self.readings: list[Reading] = []
        self.samples: list[Sample] = []
        self.num_preemptions = 0
        self._cache = cache
        self._keep_prefixes = keep_prefixes
        self._max_places = max_places
        self._free_places = max_places
        self._promised = 0

    @property
    def num_taken(self) -> int:
        """Places that are not free."""
        return self._max_places - self._free_places

    def admit(self) -> None:
        """Give places and memory to those who wait, as long as there are any."""
        while (prompt := self.line.head()) is not None:
            if not self._free_places and not self._make_place(prompt.owner):
                return
            if not self._has_room(self._cost(prompt)):
                return
            self._claim(prompt)

    def _cost(self, prompt: Prompt) -> int:
        """Return the positions that the prompt's next place needs."""
        if prompt.paused:
            length = prompt.paused[0].text_T.shape[0]
            return capacity_for(length) + capacity_for(length + 1)
        sample = capacity_for(prompt.length + 1) if prompt.request.num_samples else 0
        return sample if prompt.num_claimed else sample + capacity_for(prompt.length)

    def _claim(self, prompt: Prompt) -> None:
        self._free_places -= 1
        self.line.take_place(prompt.owner)
        if prompt.paused:
            sample = prompt.paused.pop(0)
            text_T = sample.text_T
            self._promised += capacity_for(text_T.shape[0] + 1)
            reading = self._read(prompt, text_T.shape[0], sample)
            self.readings.append(reading)
            self.line.charge(prompt.owner, reading.num_rows)
        else:
            if prompt.request.num_samples:
                self._promised += capacity_for(prompt.length + 1)
            if not prompt.num_claimed:
                # The last token of a text that is only scored predicts nothing that was asked for.
                rows = prompt.length if prompt.request.num_samples else max(1, prompt.length - 1)
                prompt.reading = self._read(prompt, rows, None)
                self.readings.append(prompt.reading)
                self.line.charge(prompt.owner, rows)
            if prompt.request.num_samples:
                prompt.unborn.append(prompt.num_claimed)
                self.line.charge(prompt.owner, prompt.advance)
            prompt.num_claimed += 1
        if not prompt.is_waiting:
            self.line.leave(prompt)

    def _read(self, prompt: Prompt, num_rows: int, sample: Sample | None) -> Reading:
        text_T = prompt.request.prompt_T if sample is None else sample.text_T
        keys = prompt.keys if sample is None else prompt.keys.grown(text_T[prompt.length :])
        cache = self._cache.new_text(text_T.shape[0], self._promised)
        reading = Reading(prompt, text_T, keys.keys, cache, num_rows, sample=sample)
        prepare(reading)
        return reading

    def _has_room(self, positions: int) -> bool:
        return self._cache.make_room(positions + self._promised)

    def _make_place(self, owner: str) -> bool:
        """Take a place from the owner with most for one who has none; False when nobody has more than one."""
        greediest = self.line.greediest
        if self.line.held(owner) or self.line.held(greediest) < 2:
            return False
        own = [sample for sample in self.samples if sample.prompt.owner == greediest]
        if not own:
            return False
        self._preempt(own[-1], keep=True)
        return True

    def make_way(self) -> None:
        """Move samples that outgrow their slots to larger ones; whoever stands in the way gives up its place."""
        for sample in list(self.samples):
            while (slot := sample.slot) is not None and slot.length == slot.slab.capacity:
                if self._has_room(self._cache.slot_cost(slot.length + 1)):
                    sample.slot = self._cache.grow(slot, self._promised)
                else:
                    self._preempt(self._victim(), keep=False)

    def _victim(self) -> Sample:
        """Return the sample with fewest tokens of the owner who holds most memory."""
        held: Counter[str] = Counter()
        for sample in self.samples:
            held[sample.prompt.owner] += 0 if sample.slot is None else sample.slot.slab.capacity
        owner = max(held, key=lambda one: held[one])
        return min(
            (sample for sample in self.samples if sample.prompt.owner == owner), key=lambda sample: len(sample.tokens)
        )

    def _preempt(self, sample: Sample, *, keep: bool) -> None:
        if keep:
            self._keep_blocks(sample)
        self.samples.remove(sample)
        self._free_slot(sample)
        sample.prompt.paused.append(sample)
        self.line.leave(sample.prompt)
        self.line.add(sample.prompt, front=True)
        self._free_place(sample.prompt)
        self.num_preemptions += 1

    def choose_parts(self, budget: int, owners: Sequence[str]) -> list[tuple[Reading, int]]:
        """Return texts of these owners, in this order, and how many of their tokens this step reads."""
        chosen: list[tuple[Reading, int]] = []
        coming: set[bytes] = set()
        turn = {owner: number for number, owner in enumerate(owners)}
        readings = [reading for reading in self.readings if reading.prompt.owner in turn]
        for reading in sorted(readings, key=lambda reading: turn[reading.prompt.owner]):
            self._skip_ahead(reading)
            start, block = reading.cache.length, reading.cache.length // BLOCK
            # A piece that has to be read at once goes beyond the budget, but one at most.
            if reading.next_packed > budget and chosen:
                continue
            count = reading.next_packed or min(budget, reading.num_rows - start)
            # Who begins like another reading lets it go first, and finds its blocks kept.
            if start % BLOCK == 0 and start + BLOCK <= reading.most_cached and reading.keys[block] in coming:
                continue
            if count:
                chosen.append((reading, count))
                if self._keeps(reading.prompt):
                    coming.update(reading.keys[block : (start + count - 1) // BLOCK + 1])
                budget = max(0, budget - count)
        return chosen

    def _skip_ahead(self, reading: Reading) -> None:
        """Copy blocks that were kept, from where the reading is, as far as they go."""
        cache = reading.cache
        while cache.length % BLOCK == 0 and cache.length + BLOCK <= reading.most_cached:
            kv_Y2GLd = self._cache.prefixes.get(reading.keys[cache.length // BLOCK])
            if kv_Y2GLd is None:
                return
            cache.kv_Y2GCd[:, :, :, cache.length : cache.length + BLOCK] = kv_Y2GLd
            cache.length += BLOCK
            reading.num_cached += BLOCK

    def advance(self, reading: Reading, count: int) -> None:
        """Count tokens as read, and keep the blocks that they complete."""
        cache = reading.cache
        first, cache.length = cache.length // BLOCK, cache.length + count
        for number in range(first, cache.length // BLOCK if self._keeps(reading.prompt) else 0):
            self._keep(reading.keys[number], cache.kv_Y2GCd[:, :, :, number * BLOCK : (number + 1) * BLOCK])

    def resume(self, reading: Reading) -> None:
        """Let a sample that was read again decode on."""
        sample = reading.sample
        assert sample is not None  # the reading is a sample's
        self._promised -= capacity_for(reading.cache.length + 1)
        sample.slot = self._cache.fork(reading.cache, self._promised)
        self._cache.free_text(reading.cache)
        self.samples.append(sample)

    def keep(self, sample: Sample) -> None:
        """Let a sample go on that has one more token."""
        prompt = sample.prompt
        if sample.slot is None:
            assert prompt.reading is not None  # until its last sample is born
            self._promised -= capacity_for(prompt.length + 1)
            sample.slot = self._cache.fork(prompt.reading.cache, self._promised)
        self.samples.append(sample)
        if len(sample.tokens) > prompt.advance:
            self.line.charge(prompt.owner, 1)

    def end(self, sample: Sample) -> None:
        """Free the place of a sample that is finished; its text may be the beginning of the next prompt."""
        self.line.charge(sample.prompt.owner, min(0, len(sample.tokens) - sample.prompt.advance))
        if sample.slot is None:
            self._promised -= capacity_for(sample.prompt.length + 1)
        else:
            self._keep_blocks(sample)
            self._free_slot(sample)
        self._free_place(sample.prompt)

    def drop_reading(self, prompt: Prompt) -> None:
        """Free the memory of a prompt whose samples are all born."""
        if prompt.reading is not None:
            self._cache.free_text(prompt.reading.cache)
            prompt.reading = prompt.logits_V = None

    def forget(self, prompt: Prompt, *, wipe: bool = False) -> None:
        """Free all that a request holds; `wipe` what may hold values that are not finite."""
        self.line.leave(prompt)
        for reading in [one for one in self.readings if one.prompt is prompt]:
            self.readings.remove(reading)
            if reading.sample is not None:
                self._promised -= capacity_for(reading.text_T.shape[0] + 1)
                self._cache.free_text(reading.cache)
                self._free_place(prompt)
        for sample in [one for one in self.samples if one.prompt is prompt]:
            self.samples.remove(sample)
            if sample.slot is None:
                self._promised -= capacity_for(prompt.length + 1)
            else:
                self._free_slot(sample, wipe=wipe)
            self._free_place(prompt)
        for _ in prompt.unborn:
            self._promised -= capacity_for(prompt.length + 1)
            self._free_place(prompt)
        if not prompt.request.num_samples and prompt.num_claimed:
            self._free_place(prompt)
        prompt.unborn, prompt.paused = [], []
        self.drop_reading(prompt)

    def _keeps(self, prompt: Prompt) -> bool:
        return self._keep_prefixes and not prompt.num_packed

    def _keep_blocks(self, sample: Sample) -> None:
        """Keep the whole blocks that a sample has added to its prompt."""
        prompt, slot = sample.prompt, sample.slot
        if slot is None or not self._keeps(prompt):
            return
        keys = prompt.keys.grown(sample.text_T[prompt.length :]).keys
        for number in range(prompt.length // BLOCK, slot.length // BLOCK):
            self._keep(keys[number], slot.block(number))

    def _keep(self, key: bytes, kv_Y2GLd: Tensor) -> None:
        if key not in self._cache.prefixes and self._has_room(BLOCK):
            self._cache.prefixes.put(key, kv_Y2GLd)

    def _free_slot(self, sample: Sample, *, wipe: bool = False) -> None:
        if sample.slot is not None:
            self._cache.release(sample.slot, wipe=wipe)
            sample.slot = None

    def _free_place(self, prompt: Prompt) -> None:
        self._free_places += 1
        self.line.give_back(prompt.owner)
