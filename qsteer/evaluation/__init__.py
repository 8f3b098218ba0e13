"""Measuring: rollouts, their statistics, agreement of gradients, pictures and films; cost: qsteer.bench.

Nothing is imported here, so that each module asks only for the packages it needs: ``rollouts``, ``compare``
and ``video`` for gymnasium, ``plots`` for matplotlib, the others for none.
"""
