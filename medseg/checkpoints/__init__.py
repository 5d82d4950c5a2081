"""Importers of published weights: published key layouts to the project's own networks."""
