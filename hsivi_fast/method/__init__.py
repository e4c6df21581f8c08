"""The mathematics of HSIVI-SM (Yu et al., NeurIPS 2023, arXiv 2310.17153), and nothing else.

May import `ops` alone. A new schedule, layer or loss touches no other room.

    symbol      word                           published name
    K           nfe, the number of layers      n_discrete_steps - 1
    tau_k       knot, timestep of layer k      timesteps
    alpha_bar   signal level                   alphas_cumprod
    sigma_k     noise level sqrt(1-alpha_bar)  -
    eps_hat     the student's noise            phinet
    f           the score network              fnet
    e           the teacher's noise            target_model
    log_gamma   log noise scale, learned       log_scaled_gamma
    gamma       relative noise level           gamma
    z           standard normal noise          noise

Layers are numbered k = K .. 1; layer k maps x_k to x_{k-1}. Tables have K + 1 entries so that they are indexed by k.
"""
