"""The paper's evaluation (Kwon et al. 2023), figure by figure, measured or simulated."""
