"""Comparing arms, learning curves, agreement of gradients, pictures and films; costs: :mod:`qsteer.bench`.

Nothing is imported here, so that each module asks only for the packages it needs: ``compare`` and ``video``
for gymnasium, the pictures of ``plots`` and ``curves`` for matplotlib, the others for none.
"""
