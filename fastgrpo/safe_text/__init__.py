"""Texts of models, data sets and users, where they are shown or kept: inert, and without secrets."""
