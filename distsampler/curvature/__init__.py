"""Curvature: the second derivatives of the loss, and the noise of its gradient.

``hessian``         the spectrum of the mean loss at some weights, by Lanczos quadrature
``watch``           the curvature along a chain, and the biases that its step has there
``gradient_noise``  the gradient's variance between examples at w*, for the heat correction
"""
