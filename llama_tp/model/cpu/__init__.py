"""Steps of few tokens on CPUs, compiled from C++ on the machine that runs them."""
