"""Keys of RLinf and Megatron-LM that have no meaning in jaxpar. They are ignored, and one note lists them."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


OPAQUE_SECTIONS = _names("""
    agentlightning agentloop critic defaults env eval hydra inference profile_data reward rollout
    rollout_judge rollout_server tools weight_syncer
""")
"""Top-level sections that are ignored as a whole. Interpolations may still refer to their values."""

FOREIGN_KEYS: dict[str, frozenset[str]] = {
    "cluster": _names("""
        auto_scheduler component_placement node_groups recreate_nccl_groups use_pre_process_policy
        use_wait_before_last_iter_policy
    """),
    "runner": _names("only_eval task_type"),
    "runner.logger": _names("experiment_name log_path"),
    "data": _names("""
        answer_key answer_separator apply_chat_template apply_chat_template_kwargs choice_key data_size dataset_name
        eval_data_paths filter_prompt_by_length image_keys is_hybrid is_markdown lazy_loading max_prompt_length
        prompt_key rollout_batch_size type unique_columns use_chat_template val_rollout_batch_size validation_shuffle
    """),
    "algorithm": _names("""
        actor_agg_q actor_update_action_noise actor_weight_schedule adv_clip_max advantage_mode agg_q
        backup_entropy bc_weight behave_weight_threshold bootstrap_type critic_actor_ratio
        critic_subsample_size critic_warmup_steps dagger demo_buffer down_sampling dropout_rate
        early_stop_imp_ratio enable_drq entropy_tuning entropy_type eval_rollout_epoch expectile
        filter_rewards hidden_dims huber_delta importance_sampling_clip
        importance_sampling_fix kl_penalty length_params logprob_forward_micro_batch_size logprob_type
        loss_scales max_drift max_num_gen_batches nft_beta nft_clip_ratio nft_energy_reduction
        nft_gather_type nft_loss_form nft_target_space nft_tau nft_weight_mode nft_weight_scale
        nft_xcur_source num_updates_per_step q_head_type q_weight recompute_v reference_dropout_prob replay_buffer
        reward_coef reward_type
        rewards_lower_bound rewards_upper_bound rlt_schedule rollout_batch_size_per_gpu rollout_epoch
        rollout_store_size_per_rank staleness_threshold target_entropy target_update_freq
        target_update_type tau temperature train_actor_steps training_batch_size_per_gpu update_epoch
        use_critic use_fixed_reset_state_ids use_valid_token_scale use_value_loss
        val_rollout_batch_size_per_gpu value_clip value_cliprange
    """),
    "algorithm.sampling_params": _names("""
        add_BOS do_sample max_new_tokens min_new_tokens repetition_penalty stop stop_token_ids temperature_eval
        temperature_train top_k top_p
    """),
    "actor": _names("""
        calculate_flops enable_dp_load_balance enable_offload eval_batch_size fsdp_config group_name mcore_gpt
        offload_grad offload_optimizer offload_weight pack_traj spec_name sync_precision training_backend
    """),
    "actor.model": _names("""
        apply_rope_fusion attention_softmax_in_fp32 batch_p2p_comm bias_activation_fusion bias_dropout_fusion
        encoder_seq_length gradient_accumulation_fusion init_method_std masked_softmax_fusion megatron_checkpoint
        moe_aux_loss_coeff moe_grouped_gemm moe_permute_fusion moe_router_bias_update_rate
        moe_router_load_balancing_type moe_router_pre_softmax moe_router_topk moe_token_dispatcher_type
        persist_layer_norm use_cpu_initialization variable_seq_lengths
    """),
    "actor.optim": _names("""
        bf16 fp16 lr_warmup_steps_ratio min_lr
        optimizer_enable_pin optimizer_offload_fraction overlap_param_gather_with_optimizer_step total_training_steps
        use_precision_aware_optimizer
    """),
    "actor.lr_sched": _names("""
        end_weight_decay override_opt_param_scheduler start_weight_decay use_checkpoint_opt_param_scheduler
        weight_decay_incr_style
    """),
    "actor.tokenizer": _names("padding_side trust_remote_code use_fast"),
    "actor.megatron": _names("""
        accumulate_allreduce_grads_in_fp32 async_save auto_detect_ckpt_format check_for_large_grads
        check_for_nan_in_loss_and_grad ckpt_convertor ckpt_format ckpt_fully_parallel_save ddp_average_in_collective
        ddp_bucket_size ddp_num_buckets ddp_pad_buckets_for_high_nccl_busbw distributed_backend
        distributed_timeout_minutes log_progress mbridge nccl_communicator_config_path
        num_distributed_optimizer_instances profiler timing_log_level timing_log_option tp_comm_bootstrap_backend
        tp_comm_overlap_cfg use_dist_ckpt use_hf_ckpt use_profiler use_tp_pp_dp_mapping
    """),
}
"""Section → its ignored keys. Everything below such a key is ignored too."""
