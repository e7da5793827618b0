"""All public modules of the coverage run, a family a file."""

from bench.coverage_modules import densities, forecasting, graphs_and_tables, language, lightning_own, vision

CASES = (*lightning_own.CASES, *language.CASES, *vision.CASES, *forecasting.CASES, *graphs_and_tables.CASES, *densities.CASES)
