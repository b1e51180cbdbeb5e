package probe

import (
	"crypto/rand"
	"encoding/base32"
	"regexp"
	"slices"
	"strings"
)

// bait marks the random secrets that are laid out for the client to find.
const bait = "bpsecret-"

var baitForm = regexp.MustCompile(bait + `[a-z2-7]{24}`)

// secretsIn lists the secrets in a text, each once.
func secretsIn(text []byte) []string {
	var all []string
	for _, m := range baitForm.FindAll(text, -1) {
		if !slices.Contains(all, string(m)) {
			all = append(all, string(m))
		}
	}
	return all
}

// random gives n letters of a kind that fits into a DNS label.
func random(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(b))[:n]
}
