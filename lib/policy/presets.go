package policy

import (
	"slices"

	"github.com/bottle-tools/bottle/lib/plan"
)

// Preset is what one agent or service needs to work in a bottle: hosts, and for
// agents the variables and first-run files that keep it quiet and off dialogs.
// No preset has a wildcard, plain HTTP, or a package registry.
type Preset struct {
	Name        string
	Description string
	Rules       []PresetRule
	Keys        []PresetKey
	Env         []plan.EnvVar
	RootEnv     []plan.EnvVar // only if the bottle's user is root
	Files       []plan.File   // relative to the guest's home
}

// PresetRule allows tls on port 443 of one exact host.
type PresetRule struct {
	Host string
	Why  string
}

// PresetKey is a variable in which people keep the key of this service, and the
// host that it is the key of: the one that knows it already.
type PresetKey struct {
	Variable, Host string
}

// presets are sorted by name. Settings of the agents: Claude Code 2.1.330 and
// Codex 0.169.0, as they behave in a bottle without a way to any other host.
var presets = []Preset{
	{
		Name:        "anthropic",
		Description: "Claude Code with an API key: the API's host, a placeholder key, no telemetry, no updates, no first-run dialogs",
		Rules: []PresetRule{
			{"api.anthropic.com", "the Anthropic API"},
		},
		Keys: []PresetKey{
			{"ANTHROPIC_API_KEY", "api.anthropic.com"},
			{"ANTHROPIC_AUTH_TOKEN", "api.anthropic.com"},
			{"CLAUDE_CODE_OAUTH_TOKEN", "api.anthropic.com"},
		},
		Env: []plan.EnvVar{
			{Name: "ANTHROPIC_API_KEY", Value: "sk-ant-placeholder"},
			{Name: "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", Value: "1"},
			{Name: "CLAUDE_CODE_DISABLE_OFFICIAL_MARKETPLACE_AUTOINSTALL", Value: "1"},
			{Name: "DISABLE_AUTOUPDATER", Value: "1"},
		},
		RootEnv: []plan.EnvVar{{Name: "IS_SANDBOX", Value: "1"}},
		Files: []plan.File{
			{Path: ".claude.json", Content: `{"hasCompletedOnboarding":true,"customApiKeyResponses":{"approved":["sk-ant-placeholder"],"rejected":[]},"projects":{"/workspace":{"hasTrustDialogAccepted":true}}}` + "\n"},
			{Path: ".claude/settings.json", Content: `{"skipDangerousModePermissionPrompt":true}` + "\n"},
		},
	},
	{
		Name:        "github",
		Description: "clone, fetch, push, releases and the API of github.com over https; note that whoever may push there may also publish there",
		Rules: []PresetRule{
			{"github.com", "git over https, downloads of releases start here"},
			{"api.github.com", "the REST and GraphQL API"},
			{"codeload.github.com", "archives of branches and tags"},
			{"objects.githubusercontent.com", "release files, large files"},
			{"raw.githubusercontent.com", "single files"},
			{"release-assets.githubusercontent.com", "release files"},
		},
	},
	{
		Name:        "openai",
		Description: "Codex with an API key: the API's host, a placeholder key, no analytics, no update check",
		Rules: []PresetRule{
			{"api.openai.com", "the OpenAI API"},
		},
		Keys: []PresetKey{
			{"CODEX_API_KEY", "api.openai.com"},
			{"OPENAI_API_KEY", "api.openai.com"},
		},
		Env: []plan.EnvVar{
			{Name: "CODEX_API_KEY", Value: "sk-placeholder"},
		},
		Files: []plan.File{
			{Path: ".codex/config.toml", Content: "check_for_update_on_startup = false\n\n[analytics]\nenabled = false\n"},
		},
	},
}

// PresetByName finds a preset; ok is false for an unknown name. The result must
// not be changed.
func PresetByName(name string) (p *Preset, ok bool) {
	i, ok := slices.BinarySearchFunc(presets, name, func(p Preset, name string) int {
		switch {
		case p.Name < name:
			return -1
		case p.Name > name:
			return 1
		}
		return 0
	})
	if !ok {
		return nil, false
	}
	return &presets[i], true
}

// PresetNames lists the presets, sorted.
func PresetNames() []string {
	names := make([]string, len(presets))
	for i := range presets {
		names[i] = presets[i].Name
	}
	return names
}
