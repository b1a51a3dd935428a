"""The end of a step, for CPUs."""

from __future__ import annotations

from runtime.kernels.cpu.arithmetic import narrow, wide
from runtime.kernels.cpu.cache import compiled
from runtime.kernels.cpu.sharing import alone, written


@compiled
def advance(team, thread, token, x, position, done, emitted, step, table, stop_ids, embed_scale, pad):
    while alone(team, thread):
        for row in range(len(token)):
            if done[row]:
                token[row] = pad
            else:
                position[row] += 1
            done[row] |= token[row] < 0
            for stop in stop_ids:
                done[row] |= token[row] == stop
            emitted[step[0] % len(emitted), row] = token[row]
            for column in range(x.shape[1]):
                x[row, column] = narrow(wide(table[max(token[row], 0), column], table) * embed_scale, x)
        step[0] += 1
        written(team, thread, 0)
