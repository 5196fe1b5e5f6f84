"""Models whose LLC is known, and ``certify()``, which holds samplers against them.

``coefficients``      learning coefficients and multiplicities: the limit of infinite data
``quadrature``        ``t E[K]`` at finite t: in closed form, or an integral in up to two dimensions
``gibbs``             the same of deep linear networks, by a sampler that has no step size
``targets``           models at w* with data and loss, ready for ``sample()``, and their exact LLC
``networks``          deep linear networks as such targets; the benchmark nets "1K" and "10K"
``codimension``       what a chain estimates on a network that it started at and has not left
``discretised_laws``  the variance that each sampler's discretised chain has on a quadratic
``law_cases``         every sampler on that quadratic, with options and step that suit it
``many_copies``       any sampler on many copies of a network at once: its error against Gibbs
``cases``             which targets are certified, and how each is sampled
``certify``           runs them by ordinary means (``sample()``, gate, LLC), and the table

K is the mean excess loss, t the inverse temperature times the number of examples (nbeta), and the
posterior ``p(w) ~ exp(-t K(w) - gamma/2 |w - w*|^2)``, gamma the localization. The finite values
converge slowly, ``t E[K] = lambda - (m - 1) / log t + o(1 / log t)`` (Watanabe 2009, theorem 6.6),
so an estimate at finite t is held against the finite value.
"""
