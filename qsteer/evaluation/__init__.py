"""Measuring: rollouts, their statistics, what an action costs, pictures and films.

Nothing is imported here, so that each module asks only for the packages it needs: ``rollouts``, ``compare``
and ``video`` for gymnasium, ``plots`` for matplotlib, the others for none.
"""
