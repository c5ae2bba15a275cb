"""Generate dispatches: streams that take feeds and send finished samples on, until drained."""

from __future__ import annotations

from collections.abc import Sequence

from realflow.data.lengths import limit_prompt
from realflow.data.text import encode_prompt
from realflow.engines.generate import Finished, Prompt
from realflow.engines.lockstep import Arrivals
from realflow.errors import InputError, Problem
from realflow.graph.types import Call
from realflow.planfile import Plan
from realflow.runtime.fields import DataFields, Examination, scene
from realflow.runtime.hosts import Hosts
from realflow.runtime.link import MasterLink
from realflow.runtime.messages import DispatchDone, Drain, Open, SampleReady
from realflow.runtime.readiness import main_rollout
from realflow.runtime.stats import Spans, response_stats
from realflow.runtime.store import FieldStore

MOST_DRAW_ID = 1 << 62
"""Ids that are drawn under are below 2**63, the samples of a prompt included."""


class Streams:
    """Runs the generate dispatches of one worker, on its main thread."""

    def __init__(
        self,
        plan: Plan,
        rank: int,
        hosts: Hosts,
        store: FieldStore,
        data: DataFields,
        link: MasterLink,
        examination: Examination | None = None,
    ) -> None:
        self._graph, self._rank, self._hosts = plan.graph, rank, hosts
        self._store, self._data, self._link = store, data, link
        self._examination = examination
        self._cut: dict[int, bool] = {}
        """Prompts that were fed to the dispatch under way, and whether they were cut."""

    def run(self, opened: Open) -> None:
        """A generate dispatch: take feeds, decode, send finished samples on, until drained.

        All ranks of a replica do the same steps; the one that speaks for the replica keeps and reports
        the samples.
        """
        call = self._graph.call(opened.call)
        examines = self._examination is not None and self._examination.has(call)
        if self._examination is not None:
            self._hosts.forget_generators(examines)
        engine = self._hosts.generator(call)
        engine.set_version(opened.version)
        arrivals = Arrivals(self._link.stream(opened.dispatch), engine.place.replica, engine.device)
        drained, spans = False, Spans()
        self._cut = {}
        stats: list[Finished] = []
        while engine.busy or not drained:
            if not drained:
                for message in arrivals.take(wait=not engine.busy):
                    if isinstance(message, Drain):
                        drained = True
                    else:
                        with spans:
                            new = opened.max_new_tokens
                            engine.feed([self._prompt(call, group, new) for group in message.groups])
            if engine.busy:
                with spans:
                    finished = engine.step()
                    if engine.speaks:
                        self._store_finished(call, finished)
                if finished and engine.speaks:
                    stats += finished
                    ids, lengths = [f.sample_id for f in finished], [len(f.tokens) for f in finished]
                    self._link.send(SampleReady(opened.dispatch, self._rank, ids, lengths))
        arrivals.close()
        self._link.close_stream(opened.dispatch)
        prefix = "" if call == main_rollout(self._graph) else f"{'eval' if examines else call.name}/"
        found = response_stats(stats, prefix)
        if engine.speaks and not examines:
            found |= self._data.lengths.of_prompts(call, self._cut)
        self._link.send(DispatchDone(opened.dispatch, self._rank, stats=found, spans=spans.merged))

    def _prompt(self, call: Call, group: int, new: int | None = None) -> Prompt:
        graph, data = scene(call, self._graph, self._data, self._examination)
        text, spec = data.row(group)[call.reads["prompt"]], graph.data
        tokens = encode_prompt(self._hosts.tokenizer(str(call.model)), text, call.chat, spec.system)
        limited = limit_prompt(tokens, spec, group)
        self._cut[group] = len(limited) < len(tokens)
        first = group * graph.samples
        ids = tuple(range(first, first + graph.samples))
        limits = None if new is None else (new,) * len(ids)
        return Prompt(group, ids, limited, limits, draw_id=self._draw_id(call, group))

    def _draw_id(self, call: Call, group: int) -> int | None:
        """The id under which the data has the first sample of a prompt drawn; None where it has none."""
        if "draw_id" not in call.reads:
            return None
        _, data = scene(call, self._graph, self._data, self._examination)
        found = data.row(group)[call.reads["draw_id"]]
        if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < MOST_DRAW_ID:
            message = f"prompt {group}: found the draw_id {found!r}, expected a whole number from 0 to 2**62"
            raise InputError(Problem(message, where="data.fields.draw_id"))
        return found

    def _store_finished(self, call: Call, finished: Sequence[Finished]) -> None:
        for name, field in call.writes.items():
            self._store.put(field, {f.sample_id: getattr(f, name) for f in finished})
