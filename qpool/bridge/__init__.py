"""Between TensorFlow's autodiff and whatever computes a call: gradients, losses, what tapes see.

arguments   what of a call is a batch, a constant, a tensor that a tape may watch
variables   the model's variables, read at once
tapes       what TensorFlow's tapes are told of
gradient    the ``tf.custom_gradient`` around a pooled call; ``third_order`` beyond it
exchanges   what a call and its derivatives ask of the workers, eagerly or in a graph
weighted    calls without a batch, of weights alone
losses      loss and gradient in one exchange
symbolic    calls with symbolic inputs (Keras' functional models)
"""
