"""Training a quantum GAN through the pool.

data.py      real data sets, checked and standardised      distance.py  two-sample distances
gan.py       the adversarial step, as a keras.Model         trainer.py   generator, critic, fit
run.py       a run directory from start to end              display.py   progress for people
plots.py     pictures of a run
"""
